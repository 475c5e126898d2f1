"""What a job will take: unit costs measured on its first chunk for every shape of model, and the arithmetic on them.

Layer 3. Measures on this machine, alone: rows of the first chunk of each data set, untrained models of each shape. What
a network, a bucket or a neighbour takes away is not in it. Stores nothing.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from pipeline.allocator import freed_memory_kept
from pipeline.arrow_bytes import arrow_bytes, read_arrow
from pipeline.batch import Batch
from pipeline.cells import CellState, Rows, decode_cell, encode_cell
from pipeline.cost import clock, cost_of
from pipeline.devices import CPU, device_named, moved
from pipeline.errors import DataError
from pipeline.flow.discover import Discovery, discover
from pipeline.kernels.base import State
from pipeline.loading import Probe
from pipeline.numerics import in_force
from pipeline.origins import Origin, made, shape_of, shown
from pipeline.parquet import parquet_bytes
from pipeline.plan import Plan, probe_of
from pipeline.registry import sources
from pipeline.resolve import Resolved
from pipeline.rows.decode import UID_MASK
from pipeline.running import Running, States
from pipeline.statistics.base import Statistic
from pipeline.store import Store
from pipeline.unit_tables import arrow_tables, controls_of

# seconds of reading that a rate is taken from, at most
READ_S = 2.0
# by which uids are moved, so that a batch's rows are new: a large odd number leaves no two of them equal
_STRIDE = 0x5851F42D4C957F2D
# batches of a chunk that are looked at as its first: states are made there, forwards recorded, most rows kept
BEGINNING = 3


@dataclass(frozen=True)
class ReadingCost:
    """What one row of a data set costs to read and decode, on one thread beside the prefetching one.

    rows    rows that it was measured on
    s       seconds per row
    bytes   bytes per row once decoded: what goes to a device
    """

    data: str
    rows: int
    s: float
    bytes: float


@dataclass(frozen=True)
class ShapeCost:
    """What models of one shape cost, measured on one batch of their data set.

    model        the name of one of them; `models` are their ids
    rows         rows of the batch
    forward_s    seconds per row of the bare forward
    statistics_s seconds per row of the statistics, beyond the forward
    begin_s      seconds that the first batches of a chunk, BEGINNING of them, take beyond as many later ones
    start_s      seconds to build one and find its sites, once per worker that meets it
    store_s      seconds to encode the states of one chunk
    state_bytes  bytes of the states of one chunk
    merge_s      seconds to read the states of one chunk back and merge them
    finish_s     seconds to make the tables of one, and to write, read and pack them
    """

    data: str
    model: str
    models: tuple[str, ...]
    rows: int
    forward_s: float
    statistics_s: float
    begin_s: float
    start_s: float
    store_s: float
    state_bytes: int
    merge_s: float
    finish_s: float

    @property
    def ratio(self) -> float:
        """What measuring costs, the bare forward being 1."""
        return (self.forward_s + self.statistics_s) / self.forward_s

    def beginning_s(self, rows: int) -> float:
        """Seconds that the first batches of a chunk of so many rows take beyond later ones."""
        return self.begin_s * min(1.0, rows / (BEGINNING * self.rows))


@dataclass(frozen=True)
class Estimate:
    """The unit costs of a job, and the kernel that they were measured with."""

    reading: tuple[ReadingCost, ...]
    shapes: tuple[ShapeCost, ...]
    kernel: str

    def seconds(self, plan: Plan, *, workers: int) -> dict[str, float]:
        """Seconds of all workers together for the missing cells of a plan, by what they go to, without training."""
        read = {one.data: one for one in self.reading}
        shape = {model: one for one in self.shapes for model in one.models}
        total = dict.fromkeys(("reading", "forward", "statistics", "start", "storing"), 0.0)
        for task in plan.measure:
            chunks = {cell.chunk.id: cell.chunk for cell in task.cells}
            total["reading"] += sum(chunk.rows for chunk in chunks.values()) * read[task.probe.data].s
            for cell in task.cells:
                cost = shape[cell.model.id]
                total["forward"] += cell.chunk.rows * cost.forward_s
                total["statistics"] += cell.chunk.rows * cost.statistics_s + cost.beginning_s(cell.chunk.rows)
                total["storing"] += cost.store_s
        tasks = Counter(model for task in plan.measure for model in task.models)
        total["start"] = sum(shape[model].start_s * min(count, workers) for model, count in tasks.items())
        return total


def estimate(resolved: Resolved, store: Store) -> Estimate:
    """Measure the unit costs of a job; DataError or ModelError where its first chunk or a shape cannot be used."""
    reading, shapes = [], []
    with in_force(resolved.numerics), freed_memory_kept():
        for data in dict.fromkeys(split.data for split in resolved.splits):
            cost, batch = _reading_cost(resolved, data, store)
            reading.append(cost)
            shapes += [_shape_cost(resolved, data, same, batch) for same in _by_shape(resolved, data)]
    return Estimate(tuple(reading), tuple(shapes), resolved.kernel)


def _reading_cost(resolved: Resolved, data: str, store: Store) -> tuple[ReadingCost, Batch]:
    """The cost of the first chunk's rows, and its first batch."""
    probe = probe_of(resolved, data)
    # whatever reads is imported by the first batch, once for each worker: that is no cost of a row
    first = next(_batches(probe, resolved.numerics.batch_rows, store), None)
    if first is None:
        raise DataError(f"data {data}: {probe.chunk.url} has no rows of split {probe.chunk.split!r} to begin with")
    start = time.perf_counter()
    rows = 0
    for batch in _batches(probe, resolved.numerics.batch_rows, store):
        rows += batch.rows
        if time.perf_counter() - start > READ_S:
            break
    seconds = time.perf_counter() - start
    return ReadingCost(data, rows, seconds / rows, _bytes(first) / first.rows), first


def _batches(probe: Probe, batch_rows: int, store: Store) -> Iterator[Batch]:
    source = sources()[probe.spec.source](probe.data, probe.spec, store)
    return iter(source.read(probe.chunk, batch_rows))


def _bytes(batch: Batch) -> int:
    held = [*batch.inputs, *batch.kwargs.values(), batch.uid_N, batch.label_N, batch.label_NS, batch.mask_NS]
    return sum(one.numel() * one.element_size() for one in held if isinstance(one, torch.Tensor))


def _by_shape(resolved: Resolved, data: str) -> list[tuple[Origin, str, tuple[str, ...]]]:
    """For each shape of model on a data set where one comes from, its name, and the ids of all."""
    found: dict[str, tuple[Origin, str, list[str]]] = {}
    for model in resolved.models:
        if model.data == data:
            found.setdefault(shape_of(model.origin), (model.origin, model.name, []))[2].append(model.id)
    return [(origin, name, tuple(ids)) for origin, name, ids in found.values()]


def _shape_cost(resolved: Resolved, data: str, same: tuple[Origin, str, tuple[str, ...]], batch: Batch) -> ShapeCost:
    origin, name, models = same
    batch = shown(origin, batch)
    split = next(split for split in resolved.splits if split.data == data)
    statistics, classes = resolved.statistics_of(split), resolved.classes[data]
    start = time.perf_counter()
    device = device_named(resolved.device)
    module, batch = made(origin).to(device), moved(batch, device, getattr(torch, origin.dtype))
    sites = resolved.job.sites
    discovery = discover(module, batch, include=sites.include, exclude=sites.exclude, rows=sites.rows, may_draw=False)
    built = time.perf_counter() - start
    cost = cost_of(module, discovery, statistics, batch, classes=classes, kernel=resolved.kernel)
    running, begun = _begun(Running(discovery, statistics, classes, resolved.kernel), module, batch)
    statistic_of = {one.name: one for one in statistics}
    start = time.perf_counter()
    stored = _encoded(running, batch.rows)
    encoded = time.perf_counter()
    states = {name: _merged(statistic_of[name], discovery, content) for name, content in stored.items()}
    merged = time.perf_counter()
    _packed(discovery, states, statistics)
    finished = time.perf_counter()
    return ShapeCost(
        data=data,
        model=name,
        models=models,
        rows=batch.rows,
        forward_s=cost.forward / batch.rows,
        statistics_s=cost.statistics / batch.rows,
        begin_s=max(0.0, begun - BEGINNING * cost.measured),
        start_s=built,
        store_s=encoded - start,
        state_bytes=sum(len(content) for content in stored.values()),
        merge_s=merged - encoded,
        finish_s=finished - merged,
    )


def _begun(running: Running, model: nn.Module, batch: Batch) -> tuple[Running, float]:
    """The states of the first batches of a chunk, and the seconds that they took; each time the rows have new names."""
    start = clock(batch)
    for number in range(BEGINNING):
        running.add(model, replace(batch, uid_N=(batch.uid_N + number * _STRIDE) & UID_MASK))
    running.finish(model)
    return running, clock(batch) - start


def _encoded(running: Running, rows: int) -> dict[str, bytes]:
    """The state objects of one chunk, by statistic."""
    ledger = Rows(total=rows, read=rows)
    return {
        name: encode_cell(CellState(states, ledger, {}, CPU, "0" * 64)) for name, states in running.states().items()
    }


def _merged(statistic: Statistic, found: Discovery, content: bytes) -> dict[str, State]:
    """The states that an object gives, as the reduce task merges them."""
    states = decode_cell(content).states
    sites = {site.name: site for site in found.sites}
    return {name: statistic.merge(sites[name], statistic.empty(sites[name]), state) for name, state in states.items()}


def _packed(found: Discovery, states: States, statistics: Sequence[Statistic]) -> None:
    """Make the tables of units, write them, and read and write them again as the pack task does."""
    keys = dict.fromkeys(("run", "model", "data", "split"), "estimate")
    tables = arrow_tables(found, states, statistics, keys=keys, controls=controls_of(found, None))
    for table in tables.values():
        parquet_bytes(read_arrow(arrow_bytes(table)))
