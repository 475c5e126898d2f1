"""Runs a measure task: reads each chunk once, shows it to every model of a group, stores one state per cell.

Layer 3. What a cell holds is a function of model, chunk, statistic and numerics, never of the group or the worker.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

from pipeline.allocator import keep_freed_memory
from pipeline.batch import Batch
from pipeline.cost import ModelCost
from pipeline.devices import device_named
from pipeline.errors import DataError
from pipeline.loading import keep_only
from pipeline.measuring.chunk import ChunkRows, Setup, measure_chunk
from pipeline.measuring.storing import Storing
from pipeline.measuring.task import MeasureTask, Missing
from pipeline.numerics import in_force
from pipeline.registry import sources
from pipeline.rows.reading import Reading, batches_in_turn, in_turn
from pipeline.stopwatch import Stopwatch
from pipeline.store import Store


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


@dataclass
class _Tally:
    """What the chunks so far have come to."""

    units: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    remarks: dict[str, None] = field(default_factory=dict)
    costs: list[ModelCost] = field(default_factory=list)

    def add(self, setup: Setup, rows: ChunkRows, cells: Sequence[Missing]) -> None:
        """Measure the cells of a chunk, but for models that have failed; one that cannot be read costs no other one."""
        left = [cell for cell in cells if cell.model.id not in self.failed]
        try:
            if left:
                done = measure_chunk(setup, rows, left)
                self.failed |= done.failed
                self.remarks |= dict.fromkeys(done.remarks)
                self.costs += done.costs
            self.units += sum(len(cell.statistics) for cell in cells)
        except DataError as error:
            self.unread = {**{cell.model.id: str(error) for cell in left}, **self.unread}


def run_measure(task: MeasureTask, store: Store) -> Measured:
    """Store the states of the task's cells; memory that is freed is kept, for the worker's next task."""
    device = device_named(task.device)
    keep_only(task.models)
    keep_freed_memory()
    watch, tally = Stopwatch(), _Tally()
    try:
        readings = _readings(task, store)
    except DataError as error:
        return Measured(0, {}, dict.fromkeys(task.models, str(error)), ())
    with (
        in_force(task.numerics),
        _read_ahead(readings) as ahead,
        Storing(task, store, watch) as storing,
    ):
        setup = Setup(task, store, device, watch, storing)
        for (chunk, cells), reading, batches in zip(task.by_chunk(), readings, ahead, strict=True):
            tally.add(setup, ChunkRows(chunk, reading, batches), cells)
        storing.wait()
    return Measured(tally.units, tally.failed, tally.unread, tuple(tally.remarks), tuple(tally.costs), watch.spent)


def _readings(task: MeasureTask, store: Store) -> list[Reading[Any, Any]]:
    source = sources()[task.probe.spec.source](task.probe.data, task.probe.spec, store)
    return [source.read(chunk, task.numerics.batch_rows) for chunk, _ in task.by_chunk()]


@contextmanager
def _read_ahead(readings: Sequence[Reading[Any, Any]]) -> Iterator[Iterator[Iterator[Batch]]]:
    """The batches of each reading: one thread fetches and one decodes beside what is measured, over ends of chunks.

    The first batch is begun at once, while models are loaded; a bucket is slow to give it.
    """
    with closing(batches_in_turn(readings)) as each, closing(in_turn([partial(next, each)] * len(readings))) as ahead:
        yield ahead
