"""From the unit costs of a job to a larger one: so many models, so many rows, so many workers.

Layer 3: arithmetic on what `estimate` measured, and the two costs that grow with the number of tasks rather than rows.
Everything scales in proportion but what one process does alone: the driver, and the listings and records it waits for.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from statistics import median

from pipeline.estimate import Estimate, ShapeCost
from pipeline.plan import GROUP_MODELS, LISTINGS, TASKS_PER_WORKER, Plan, all_measure_tasks
from pipeline.store import Store

# listings of a store that hold nothing, of which the median counts
REQUESTS = 5
# the driver's work for one task besides planning and pickling it: `python -m benchmarks.orchestration` measures it
CALL_S = 0.0012
MEASURE_S = 0.05


@dataclass(frozen=True)
class Overheads:
    """What grows with tasks and cells.

    request_s  seconds of one request to the store
    cell_s     seconds of the driver to plan, pickle and take back one model on one chunk
    """

    request_s: float
    cell_s: float


@dataclass(frozen=True)
class Target:
    """The census in question: every model on all rows. `speed`: a worker's forward and statistics, here being 1."""

    models: int
    rows: int
    workers: int
    chunk_rows: int
    statistics: int
    speed: float = 1.0

    @property
    def chunks(self) -> int:
        """Chunks of the data set."""
        return ceil(self.rows / self.chunk_rows)

    @property
    def groups(self) -> int:
        """Groups of models that share one reading."""
        return ceil(self.models / min(GROUP_MODELS, max(1, ceil(self.models / self.workers))))

    @property
    def tasks(self) -> int:
        """Measure tasks: those of each group are a few for each worker, of whole chunks."""
        return self.groups * min(self.chunks, TASKS_PER_WORKER * self.workers)


@dataclass(frozen=True)
class Projection:
    """What a census takes: seconds that pass for each of its parts, and how much of what there is.

    Reading goes on beside the forward and the statistics, so that only the slower of the two is waited for.
    """

    target: Target
    seconds: dict[str, float]
    state_bytes: int
    requests: int

    @property
    def total_s(self) -> float:
        """Seconds from beginning to end."""
        beside = self.seconds["forward"] + self.seconds["statistics"]
        others = sum(spent for name, spent in self.seconds.items() if name not in ("reading", "forward", "statistics"))
        return max(self.seconds["reading"], beside) + others

    @property
    def bottleneck(self) -> str:
        """The part that takes longest."""
        return max(self.seconds, key=lambda name: self.seconds[name])


def target_of(
    plan: Plan, *, models: int | None, rows: int | None, chunk_rows: int | None, workers: int, speed: float
) -> Target:
    """The plan's own census where nothing else is asked for."""
    resolved = plan.resolved
    chunks = [chunk for split in resolved.splits for chunk in split.chunks]
    return Target(
        models=models or len(resolved.models),
        rows=rows or sum(chunk.rows for chunk in chunks),
        workers=workers,
        chunk_rows=chunk_rows or max(spec.chunk_rows for spec in resolved.job.data.values()),
        statistics=len(resolved.statistics),
        speed=speed,
    )


def project(units: Estimate, overheads: Overheads, target: Target) -> Projection:
    """What the target takes, its models being of the job's shapes in the job's proportions."""
    cells = target.models * target.chunks
    workers = target.workers
    # states are read back once each to be merged
    requests = 2 * cells * target.statistics + 12 * target.models
    each = _mean(units)

    def statistics_s(cost: ShapeCost) -> float:
        begin_s = target.chunks * cost.beginning_s(target.chunk_rows)
        return target.rows * cost.statistics_s + begin_s

    reading_s = sum(one.s for one in units.reading) / len(units.reading)
    seconds = {
        "reading": target.groups * target.rows * reading_s / workers,
        "forward": target.models * target.rows * each(lambda one: one.forward_s) / workers / target.speed,
        "statistics": target.models * each(statistics_s) / workers / target.speed,
        "finding sites": target.models
        * min(target.chunks, 2 * TASKS_PER_WORKER)
        * each(lambda one: one.start_s)
        / workers,
        "encoding and merging states": cells * each(lambda one: one.store_s + one.merge_s) / workers,
        "store requests": requests * overheads.request_s / workers,
        "tables and packing": target.models * each(lambda one: one.finish_s) / workers,
        "driver": cells * overheads.cell_s + target.tasks * CALL_S + 2 * target.models * overheads.request_s / LISTINGS,
    }
    return Projection(target, seconds, round(cells * each(lambda one: one.state_bytes)), requests)


def _mean(units: Estimate) -> Callable[[Callable[[ShapeCost], float]], float]:
    models = sum(len(one.models) for one in units.shapes)
    return lambda cost: sum(cost(one) * len(one.models) for one in units.shapes) / models


def overheads(plan: Plan, store: Store) -> Overheads:
    """Measure a request to the store, and the driver's work for a cell of the plan as if none were stored."""
    requests = [_seconds(lambda: store.keys("projection-of-nothing/")) for _ in range(REQUESTS)]
    spent = cells = 0.0
    while spent < MEASURE_S:
        start = time.perf_counter()
        tasks = [pickle.loads(pickle.dumps(task)) for task in all_measure_tasks(plan.resolved)]
        spent += time.perf_counter() - start
        cells += sum(len(task.cells) for task in tasks)
    return Overheads(median(requests), spent / cells)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
