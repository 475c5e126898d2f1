"""One chunk, shown batch by batch to every model of a group.

Layer 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from pipeline.batch import Batch
from pipeline.cells import CellState, Damaged, Rows
from pipeline.cost import ModelCost
from pipeline.devices import full_name, moved
from pipeline.errors import ModelError
from pipeline.loading import load
from pipeline.measuring.storing import Storing
from pipeline.measuring.task import MeasureTask, Missing
from pipeline.measuring.watched import Watched
from pipeline.origins import shape_of
from pipeline.rows.reading import Reading
from pipeline.running import Running
from pipeline.sources.base import Chunk
from pipeline.stopwatch import Stopwatch
from pipeline.store import Store


class ChunkRows(NamedTuple):
    """A chunk, its batches, and the ledger of its rows, whole when they have been gone through."""

    chunk: Chunk
    ledger: Reading[Any, Any]
    batches: Iterator[Batch]


@dataclass(frozen=True, eq=False)
class Setup:
    """What the chunks of a task are measured with."""

    task: MeasureTask
    store: Store
    device: torch.device
    watch: Stopwatch
    storing: Storing


class Done(NamedTuple):
    """Of a chunk: the models that failed by themselves, with the reason; remarks; what the statistics cost."""

    failed: dict[str, str]
    remarks: list[str]
    costs: list[ModelCost]


def measure_chunk(setup: Setup, rows: ChunkRows, cells: Sequence[Missing]) -> Done:
    """Show a chunk to the models of its cells and begin to store their states."""
    with setup.watch.on("loading"):
        watched, failed = _loaded(setup, cells)
    if not watched:
        return Done(failed, [], [])
    timed = _show(setup, rows, watched)
    seen = _seen(setup, rows)
    sound = [one for one in watched if one.failure is None]
    costs: list[ModelCost] = []
    if timed is not None:
        # before a thread has states to write down and hash, which would slow the bare forward alone
        with setup.watch.on("comparing with the bare forward"):
            costs = _costs(setup.task, sound, timed)
    setup.storing.begin([(one.cell, one.cells(seen)) for one in sound])
    failed |= {one.cell.model.id: one.failure for one in watched if one.failure is not None}
    return Done(failed, [remark for one in watched for remark in one.running.remarks()], costs)


def _loaded(setup: Setup, cells: Sequence[Missing]) -> tuple[list[Watched], dict[str, str]]:
    """The models of the cells with nothing shown yet, and why others cannot be had."""
    task, watched, failed = setup.task, [], {}
    for cell in cells:
        try:
            loaded = load(cell.model, task.probe, task.sites, setup.store, setup.device)
            running = Running(loaded.discovery, cell.statistics, task.classes, task.kernel, loaded.forwards)
            watched.append(Watched(cell, loaded, running))
        except ModelError as error:
            failed[cell.model.id] = str(error)
    return watched, failed


def _show(setup: Setup, rows: ChunkRows, watched: Sequence[Watched]) -> Batch | None:
    """Show the models every batch; return the first one where they are timed."""
    dtype = getattr(torch, setup.task.numerics.dtype)
    # a GPU is waited for on the first chunk only
    is_timed = rows.chunk == setup.task.probe.chunk
    first: Batch | None = None
    for batch in setup.watch.over("reading", rows.batches):
        with setup.watch.on("measuring"):
            batch = moved(batch, setup.device, dtype)
            for one in watched:
                one.show(batch, timed=is_timed)
        first = batch if is_timed and first is None else first
    with setup.watch.on("measuring"):
        for one in watched:
            one.finish(first)
    return first


def _seen(setup: Setup, rows: ChunkRows) -> CellState:
    """What every cell of the chunk says of its rows, whichever its statistic and model."""
    ledger = rows.ledger
    read = Rows(total=rows.chunk.rows, read=ledger.read, unreadable=ledger.unreadable, excluded=ledger.excluded)
    damage = tuple(Damaged(one.first_row, one.rows, one.reason) for one in ledger.damage)
    return CellState({}, read, {}, full_name(setup.device), "", damage=damage)


def _costs(task: MeasureTask, watched: Sequence[Watched], batch: Batch) -> list[ModelCost]:
    """What the statistics of one model of each shape cost, on a batch that has been measured."""
    shapes = {shape_of(one.cell.model.origin): one for one in reversed(watched)}
    return [ModelCost(task.probe.data, one.cell.model.id, one.cost(batch)) for one in reversed(shapes.values())]
