"""The measure task: read each chunk once, run every model of a group on it, store one state per cell.

Layer 3. What a cell holds is a function of model, chunk, statistic and numerics, never of the group or the worker.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from pipeline.allocator import freed_memory_kept
from pipeline.batch import Batch
from pipeline.cells import CellState, Damaged, Rows, cell_key, encode_cell
from pipeline.cost import ModelCost, clock, cost_beside
from pipeline.devices import CPU, device_named, full_name, moved
from pipeline.entries import Model
from pipeline.errors import DataError, ModelError
from pipeline.job import Numerics, SiteSelection
from pipeline.loading import Loaded, Probe, keep_only, load
from pipeline.numerics import in_force
from pipeline.origins import shape_of
from pipeline.registry import sources
from pipeline.rows.reading import Reading, batches_in_turn, in_turn
from pipeline.running import Running
from pipeline.scores import Sums, added, score
from pipeline.sources.base import Chunk
from pipeline.statistics.base import Statistic
from pipeline.stopwatch import Stopwatch
from pipeline.store import Store


@dataclass(frozen=True)
class Missing:
    """The cells of one model and chunk that are not stored yet."""

    model: Model
    chunk: Chunk
    statistics: tuple[Statistic, ...]


@dataclass(frozen=True)
class MeasureTask:
    """Missing cells of some models on some chunks of one split.

    `state_names` gives the folder of each statistic's states; `classes` is the number of classes of the labels;
    `kernel` is the one that the run names for all of its workers, and `device` where each of them measures.
    """

    probe: Probe
    cells: tuple[Missing, ...]
    state_names: Mapping[str, str]
    numerics: Numerics
    sites: SiteSelection
    classes: int
    kernel: str
    device: str = CPU

    @property
    def models(self) -> tuple[str, ...]:
        """Ids of the models that the task is about."""
        return tuple(dict.fromkeys(cell.model.id for cell in self.cells))

    @property
    def units(self) -> int:
        """Cells to compute."""
        return sum(len(cell.statistics) for cell in self.cells)

    def without(self, models: Collection[str]) -> MeasureTask:
        """The task without the cells of some models."""
        return replace(self, cells=tuple(cell for cell in self.cells if cell.model.id not in models))

    def by_chunk(self) -> Iterator[tuple[Chunk, tuple[Missing, ...]]]:
        """The chunks in plan order, each with its cells."""
        for cells in groupby(self.cells, key=lambda cell: cell.chunk.id):
            same = tuple(cells[1])
            yield same[0].chunk, same

    def parts(self) -> tuple[MeasureTask, ...]:
        """The task cut by chunks, that of a single chunk by models; nothing if it is of one model and chunk."""
        if len(self.cells) == 1:
            return ()
        chunks = [cells for _, cells in self.by_chunk()]
        cut = chunks if len(chunks) > 1 else [(cell,) for cell in self.cells]
        return tuple(replace(self, cells=cells) for cells in cut)


class Measured(NamedTuple):
    """Cells stored, models that failed by themselves, and models with rows that cannot be read, with the reason.

    `remarks` say what a person should know of how it was done. For the log: what the statistics cost on the run's first
    chunk, a model of each shape, and the seconds `spent` on what.
    """

    units: int
    failed: dict[str, str]
    unread: dict[str, str]
    remarks: tuple[str, ...]
    costs: tuple[ModelCost, ...] = ()
    spent: Mapping[str, float] = MappingProxyType({})


def run_measure(task: MeasureTask, store: Store) -> Measured:
    """Store the states of the task's cells; a chunk that cannot be read costs no other one."""
    device = device_named(task.device)
    keep_only(task.models)
    units = 0
    failed: dict[str, str] = {}
    unread: dict[str, str] = {}
    remarks: dict[str, None] = {}
    costs: list[ModelCost] = []
    watch = Stopwatch()
    chunks = list(task.by_chunk())
    try:
        readings = _readings(task, [chunk for chunk, _ in chunks], store)
    except DataError as error:
        return Measured(0, {}, dict.fromkeys(task.models, str(error)), ())
    with (
        in_force(task.numerics),
        freed_memory_kept(),
        _read_ahead(readings) as ahead,
        _Storing(task, store, watch) as storing,
    ):
        for (chunk, cells), reading, batches in zip(chunks, readings, ahead, strict=True):
            left = [cell for cell in cells if cell.model.id not in failed]
            try:
                if left:
                    rows = _Rows(chunk, reading, batches)
                    done = _measure_chunk(task, rows, left, store, device, watch, storing)
                    failed |= done.failed
                    remarks |= dict.fromkeys(done.remarks)
                    costs += done.costs
                units += sum(len(cell.statistics) for cell in cells)
            except DataError as error:
                unread = {**{cell.model.id: str(error) for cell in left}, **unread}
        storing.wait()
    return Measured(units, failed, unread, tuple(remarks), tuple(costs), watch.spent)


class _Storing:
    """Stores what a chunk gave in a thread while the next one is measured: a disk and a bucket take their time.

    One chunk at a time, so that the states of no more than one wait. A task is done when all of its cells are whole.
    """

    def __init__(self, task: MeasureTask, store: Store, watch: Stopwatch) -> None:
        self._task = task
        self._store = store
        self._watch = watch
        self._thread = ThreadPoolExecutor(1)
        self._begun: Future[None] | None = None

    def __enter__(self) -> _Storing:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def begin(self, measured: Sequence[tuple[Missing, Mapping[str, CellState]]]) -> None:
        """Store the cells of a chunk, once those of the one before are stored. StoreError where one cannot be."""
        self.wait()
        self._begun = self._thread.submit(self._store_all, measured)

    def wait(self) -> None:
        """Return when everything is stored; StoreError where it cannot be."""
        with self._watch.on("storing"):
            if self._begun is not None:
                self._begun.result()
        self._begun = None

    def _store_all(self, measured: Sequence[tuple[Missing, Mapping[str, CellState]]]) -> None:
        for cell, states in measured:
            _store_cells(self._task, cell, states, self._store)


class _Rows(NamedTuple):
    """A chunk, its batches, and the ledger of its rows, whole when they have been gone through."""

    chunk: Chunk
    ledger: Reading[Any, Any]
    batches: Iterator[Batch]


def _readings(task: MeasureTask, chunks: Sequence[Chunk], store: Store) -> list[Reading[Any, Any]]:
    source = sources()[task.probe.spec.source](task.probe.data, task.probe.spec, store)
    return [source.read(chunk, task.numerics.batch_rows) for chunk in chunks]


@contextmanager
def _read_ahead(readings: Sequence[Reading[Any, Any]]) -> Iterator[Iterator[Iterator[Batch]]]:
    """The batches of each reading: one thread fetches and one decodes beside what is measured, over ends of chunks.

    The first batch is begun at once, while models are loaded; a bucket is slow to give it.
    """
    with closing(batches_in_turn(readings)) as each, closing(in_turn([partial(next, each)] * len(readings))) as ahead:
        yield ahead


@dataclass(frozen=True, eq=False)
class _Watched:
    cell: Missing
    loaded: Loaded
    running: Running
    scores: list[Sums] = field(default_factory=list)
    # of each batch, for the log
    seconds: list[float] = field(default_factory=list)


class _Done(NamedTuple):
    """Of a chunk: the models that failed by themselves, with the reason; remarks; what the statistics cost."""

    failed: dict[str, str]
    remarks: list[str]
    costs: list[ModelCost]


def _measure_chunk(
    task: MeasureTask,
    rows: _Rows,
    cells: Sequence[Missing],
    store: Store,
    device: torch.device,
    watch: Stopwatch,
    storing: _Storing,
) -> _Done:
    failed: dict[str, str] = {}
    watched: list[_Watched] = []
    with watch.on("loading"):
        for cell in cells:
            try:
                loaded = load(cell.model, task.probe, task.sites, store, device)
                running = Running(loaded.discovery, cell.statistics, task.classes, task.kernel)
                watched.append(_Watched(cell, loaded, running))
            except ModelError as error:
                failed[cell.model.id] = str(error)
    if not watched:
        return _Done(failed, [], [])
    dtype = getattr(torch, task.numerics.dtype)
    # a GPU is waited for on the first chunk only
    is_first = rows.chunk == task.probe.chunk
    shown: Batch | None = None
    for batch in watch.over("reading", rows.batches):
        with watch.on("measuring"):
            batch = moved(batch, device, dtype)
            failed |= _show(batch, [one for one in watched if one.cell.model.id not in failed], timed=is_first)
        shown = batch if is_first and shown is None else shown
    with watch.on("measuring"):
        failed |= _finish([one for one in watched if one.cell.model.id not in failed], shown)
    ledger = rows.ledger
    read = Rows(total=rows.chunk.rows, read=ledger.read, unreadable=ledger.unreadable, excluded=ledger.excluded)
    damage = tuple(Damaged(one.first_row, one.rows, one.reason) for one in ledger.damage)
    seen = CellState({}, read, {}, full_name(device), "", damage)
    sound = [one for one in watched if one.cell.model.id not in failed]
    storing.begin([(one.cell, _cells(one, seen)) for one in sound])
    costs: list[ModelCost] = []
    if shown is not None:
        with watch.on("comparing with the bare forward"):
            costs = _costs(task, sound, shown)
    return _Done(failed, [remark for one in watched for remark in one.running.remarks()], costs)


def _costs(task: MeasureTask, watched: Sequence[_Watched], batch: Batch) -> list[ModelCost]:
    """What the statistics of one model of each shape cost, on a batch that has been measured."""
    shapes = {shape_of(one.cell.model.origin): one for one in reversed(watched)}
    return [
        ModelCost(
            task.probe.data,
            one.cell.model.id,
            cost_beside(one.loaded.module, one.loaded.shown(batch), one.seconds),
        )
        for one in reversed(shapes.values())
    ]


def _show(batch: Batch, watched: Sequence[_Watched], *, timed: bool) -> dict[str, str]:
    failed: dict[str, str] = {}
    for one in watched:
        start = clock(batch) if timed else 0.0
        try:
            output = one.running.add(one.loaded.module, one.loaded.shown(batch))
            one.scores.append(score(output, batch, one.loaded.objective))
        except ModelError as error:
            failed[one.cell.model.id] = str(error)
        if timed:
            one.seconds.append(clock(batch) - start)
    return failed


def _finish(watched: Sequence[_Watched], timed: Batch | None) -> dict[str, str]:
    """Show the models the rows that are held back still; if timed, their seconds belong to the last batch."""
    failed: dict[str, str] = {}
    for one in watched:
        start = clock(timed) if timed else 0.0
        try:
            one.running.finish(one.loaded.module)
        except ModelError as error:
            failed[one.cell.model.id] = str(error)
        if timed and one.seconds:
            one.seconds[-1] += clock(timed) - start
    return failed


def _cells(one: _Watched, seen: CellState) -> dict[str, CellState]:
    """The cells of one model and chunk by statistic."""
    seen = replace(seen, scores=added(one.scores), checkpoint=one.loaded.sha256)
    return {name: replace(seen, states=states) for name, states in one.running.states().items()}


def _store_cells(task: MeasureTask, cell: Missing, cells: Mapping[str, CellState], store: Store) -> None:
    store.put_all(
        (cell_key(cell.model.id, task.state_names[name], cell.chunk.id), encode_cell(state))
        for name, state in cells.items()
    )
