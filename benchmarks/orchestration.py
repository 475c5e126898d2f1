"""What a census costs besides its work: python -m benchmarks.orchestration [--json FILE]

The driver alone: a run of 1,000 tiny models on 80 chunks, 10,000 tasks and more, by an executor that does nothing but
pickle each task, so that resolving, planning, claims, listings, tasks, receipts, records and the commit are all that is
left. Then the executor on Ray: calls that do nothing, and calls of a known amount of work on one and on two workers,
whose efficiency is work / (workers × time that passed). The bound: ≥ 0.9 for tasks of 5 s.
"""

from __future__ import annotations

import cProfile
import json
import pickle
import pstats
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cells import cell_key
from pipeline.executor import Lost
from pipeline.job import Job, load_job
from pipeline.job_sections import Resources
from pipeline.manifest import File
from pipeline.models.base import checkpoint_key
from pipeline.pack import PackTask
from pipeline.progress import Progress
from pipeline.reduce import DONE, ReduceTask, reduced_key, rows_key
from pipeline.resolve import Resolved, resolve
from pipeline.run import carry_out
from pipeline.store import ObjectStore, open_store
from pipeline.task import Receipt, Task
from pipeline.training import TrainTask

GROUP_ROWS, FEATURES = 100, 4
TABLES = ("models", "sites", "neurons", "receipts")
JOB = """
name = "tiny"
[data.made]
url = "made.parquet"
classes = 2
train = "all"
measure = ["all"]
chunk_rows = {rows}
[data.made.columns]
features = "x"
label = "y"
shape = [{features}]
[[models]]
family = "mlp"
data = "made"
seeds = [{seeds}]
hyperparameters = {{ widths = [4] }}
[statistics.response]
[statistics.template]
[statistics.weights]
"""


def tiny_job(folder: Path, *, models: int, chunks: int) -> Job:
    """A job of so many models, half of them untrained twins, on so many chunks."""
    draw = np.random.default_rng(0)
    rows = chunks * GROUP_ROWS
    features = pa.FixedSizeListArray.from_arrays(
        pa.array(draw.normal(size=rows * FEATURES).astype("float32")), FEATURES
    )
    table = pa.table({"x": features, "y": draw.integers(0, 2, rows)})
    pq.write_table(table, folder / "made.parquet", row_group_size=GROUP_ROWS)
    path = folder / "tiny.toml"
    seeds = ", ".join(map(str, range(models // 2)))
    path.write_text(JOB.format(rows=GROUP_ROWS, features=FEATURES, seeds=seeds))
    return load_job(path)


class Measured(ObjectStore):
    """A store in memory that names the cells of a run once it has been measured, and has none of them."""

    def __init__(self, url: str, resolved: Resolved) -> None:
        super().__init__(url)
        self.is_measured = False
        names = [resolved.state_name(one) for split in resolved.splits for one in resolved.statistics_of(split)]
        self._cells = [(name, chunk.id) for split in resolved.splits for chunk in split.chunks for name in names]

    def keys(self, prefix: str = "") -> list[str]:
        """See `Store`."""
        kind, _, model = prefix.rstrip("/").partition("/")
        if self.is_measured and kind == "states":
            return [cell_key(model, name, chunk) for name, chunk in self._cells]
        return super().keys(prefix)


class Nothing:
    """An executor that pickles each task as one on a cluster would, and says that it was done."""

    def __init__(self, store: Measured, *, workers: int) -> None:
        self.store = store
        self.workers = workers
        self.tasks = 0
        self.bytes = 0

    def map(self, function: Callable[[Any], Any], tasks: Sequence[Task]) -> Iterator[tuple[int, Any | Lost]]:
        """Yield a receipt for each task."""
        for number, task in enumerate(tasks):
            self.tasks += 1
            self.bytes += len(pickle.dumps(task))
            yield number, pickle.loads(pickle.dumps(self._done(task)))

    def _done(self, task: Task) -> Receipt:
        kind = type(task).__name__.removesuffix("Task").lower()
        if isinstance(task, TrainTask):
            for recipe in task.recipes:
                for step in recipe.checkpoints:
                    self.store.put_once(checkpoint_key(recipe.model_id(step)), b"")
        if isinstance(task, ReduceTask):
            self.store.is_measured = True
            coverage = {f"{one.split.data}/{one.split.name}": one.split.rows for one in task.measured}
            for table in TABLES:
                self.store.put_once(rows_key(task.run, task.model.id, table), b"")
            record = {
                "files": {table: {"rows": 6, "bytes": 100_000} for table in TABLES},
                "coverage": {name: {"total": rows, "read": rows} for name, rows in coverage.items()},
                "failure": None,
            }
            self.store.put_once(reduced_key(task.run, task.model.id, DONE), json.dumps(record).encode())
        if isinstance(task, PackTask):
            self.store.put_once(task.key, b"")
            file = File(task.table, task.key, "0" * 64, 1, 1, task.models[0], task.models[-1])
            return Receipt(kind, task.units, file=file)
        return Receipt(kind, task.units)


class Stages(Progress):
    """When each stage began, and the greatest memory of the process until then."""

    def __init__(self) -> None:
        self.begun: list[tuple[str, float, float]] = [("resolve and plan", time.process_time(), _peak_mib())]

    def stage(self, name: str, total: int, done: int = 0) -> None:
        """Note the time."""
        self.begun.append((name, time.process_time(), _peak_mib()))

    def advance(self, units: int = 1) -> None:
        """Nothing to show."""

    def note(self, text: str) -> None:
        """Nothing to show."""


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@dataclass(frozen=True)
class Driver:
    """What a run of nothing cost its driver: CPU seconds by stage, bytes of tasks, MiB by which memory grew."""

    models: int
    tasks: int
    cells: int
    seconds: dict[str, float]
    task_bytes: int
    grown_mib: float

    @property
    def per_thousand(self) -> dict[str, float]:
        """Seconds and MB for 1,000 tasks."""
        thousands = self.tasks / 1000
        return {"seconds": sum(self.seconds.values()) / thousands, "MB": self.task_bytes / 1e6 / thousands}


def driver(*, models: int, chunks: int, workers: int) -> Driver:
    """Run everything but the work."""
    with tempfile.TemporaryDirectory() as folder:
        job = tiny_job(Path(folder), models=models, chunks=chunks)
        url = f"memory://orchestration-{models}-{chunks}-{time.time_ns()}"
        stages = Stages()
        resolved = resolve(job, open_store(url))
        store = Measured(url, resolved)
        executor = Nothing(store, workers=workers)
        carry_out(resolved, store, executor, stages)
    ends = [*(start for _, start, _ in stages.begun[1:]), time.process_time()]
    seconds = {name: end - start for (name, start, _), end in zip(stages.begun, ends, strict=True)}
    grown = _peak_mib() - stages.begun[0][2]
    return Driver(models, executor.tasks, models * chunks * 3, seconds, executor.bytes, grown)


def _work(cpu_s: float) -> float:
    """Keep one core busy for so many seconds of its own time, whatever else the machine does."""
    start = time.process_time()
    while time.process_time() - start < cpu_s:
        sum(number * number for number in range(10_000))
    return time.process_time() - start


def on_ray(*, workers: int, tasks: int, task_s: float) -> float:
    """Seconds that pass from the first task to the last receipt, with the workers up."""
    from pipeline.cluster.executor import ray_executor

    with ray_executor("local", Resources(workers=workers)) as executor:
        list(executor.map(_work, [0.0] * workers * 2))
        start = time.perf_counter()
        list(executor.map(_work, [task_s] * tasks))
        return time.perf_counter() - start


@click.command(help=__doc__, epilog="It takes some two minutes, with --no-ray one.")
@click.option("--models", default=1000, show_default=True)
@click.option("--chunks", default=80, show_default=True)
@click.option("--workers", default=64, show_default=True, help="Workers that the driver plans for.")
@click.option("--task-seconds", default=5.0, show_default=True, help="CPU seconds of a task on Ray.")
@click.option("--ray/--no-ray", default=True, show_default=True)
@click.option("--profile", is_flag=True, help="Print where the driver's time goes.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="File for the figures.")
def main(
    models: int, chunks: int, workers: int, task_seconds: float, ray: bool, profile: bool, output: Path | None
) -> None:
    figures: dict[str, Any] = {}
    if profile:
        with cProfile.Profile() as watched:
            driver(models=models, chunks=chunks, workers=workers)
        pstats.Stats(watched).sort_stats("cumulative").print_stats(45)
        return
    driver(models=4, chunks=2, workers=1)  # imports
    for size in (models // 4, models // 2, models):
        found = driver(models=size, chunks=chunks, workers=workers)
        figures[f"driver, {size} models"] = found.per_thousand | {"tasks": found.tasks, "grown MiB": found.grown_mib}
        spent = ", ".join(f"{name} {seconds:.2f}" for name, seconds in found.seconds.items())
        click.echo(
            f"{size} models × {chunks} chunks: {found.tasks} tasks; {found.per_thousand['seconds']:.2f} s and "
            f"{found.per_thousand['MB']:.2f} MB of tasks per 1,000; memory grew by {found.grown_mib:.0f} MiB ({spent})"
        )
    if ray:
        seconds = on_ray(workers=2, tasks=1000, task_s=0.0)
        figures["ray, 1000 empty tasks"] = seconds
        click.echo(f"1,000 empty tasks on Ray: {seconds:.2f} s")
        for count in (1, 2):
            passed = on_ray(workers=count, tasks=4 * count, task_s=task_seconds)
            figures[f"ray, efficiency at {count}"] = 4 * task_seconds / passed
            click.echo(f"{4 * count} tasks of {task_seconds:g} s on {count} workers: {4 * task_seconds / passed:.3f}")
    if output:
        output.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
