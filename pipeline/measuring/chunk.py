"""One chunk, shown batch by batch to every model of a group.

Layer 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from pipeline.batch import Batch
from pipeline.cells import CellState, Damaged, Rows
from pipeline.cost import ModelCost, clock, cost_beside
from pipeline.devices import full_name, moved
from pipeline.errors import ModelError
from pipeline.loading import Loaded, load
from pipeline.measuring.storing import Storing
from pipeline.measuring.task import MeasureTask, Missing
from pipeline.origins import shape_of
from pipeline.rows.reading import Reading
from pipeline.running import Running
from pipeline.scores import Sums, added, score
from pipeline.sources.base import Chunk
from pipeline.stopwatch import Stopwatch
from pipeline.store import Store


class ChunkRows(NamedTuple):
    """A chunk, its batches, and the ledger of its rows, whole when they have been gone through."""

    chunk: Chunk
    ledger: Reading[Any, Any]
    batches: Iterator[Batch]


@dataclass(frozen=True, eq=False)
class _Watched:
    cell: Missing
    loaded: Loaded
    running: Running
    scores: list[Sums] = field(default_factory=list)
    # of each batch, for the log
    seconds: list[float] = field(default_factory=list)


class Done(NamedTuple):
    """Of a chunk: the models that failed by themselves, with the reason; remarks; what the statistics cost."""

    failed: dict[str, str]
    remarks: list[str]
    costs: list[ModelCost]


def measure_chunk(
    task: MeasureTask,
    rows: ChunkRows,
    cells: Sequence[Missing],
    store: Store,
    device: torch.device,
    watch: Stopwatch,
    storing: Storing,
) -> Done:
    """Show a chunk to the models of its cells and begin to store their states."""
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
        return Done(failed, [], [])
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
    return Done(failed, [remark for one in watched for remark in one.running.remarks()], costs)


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
