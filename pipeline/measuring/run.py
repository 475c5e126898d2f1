"""Runs a measure task: reads each chunk once, shows it to every model of a group, stores one state per cell.

Layer 3. What a cell holds is a function of model, chunk, statistic and numerics, never of the group or the worker.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

from pipeline.allocator import freed_memory_kept
from pipeline.batch import Batch
from pipeline.cost import ModelCost
from pipeline.devices import device_named
from pipeline.errors import DataError
from pipeline.loading import keep_only
from pipeline.measuring.chunk import ChunkRows, measure_chunk
from pipeline.measuring.storing import Storing
from pipeline.measuring.task import MeasureTask
from pipeline.numerics import in_force
from pipeline.registry import sources
from pipeline.rows.reading import Reading, batches_in_turn, in_turn
from pipeline.sources.base import Chunk
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
        Storing(task, store, watch) as storing,
    ):
        for (chunk, cells), reading, batches in zip(chunks, readings, ahead, strict=True):
            left = [cell for cell in cells if cell.model.id not in failed]
            try:
                if left:
                    rows = ChunkRows(chunk, reading, batches)
                    done = measure_chunk(task, rows, left, store, device, watch, storing)
                    failed |= done.failed
                    remarks |= dict.fromkeys(done.remarks)
                    costs += done.costs
                units += sum(len(cell.statistics) for cell in cells)
            except DataError as error:
                unread = {**{cell.model.id: str(error) for cell in left}, **unread}
        storing.wait()
    return Measured(units, failed, unread, tuple(remarks), tuple(costs), watch.spent)


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
