"""The whole path of a measure task, from Parquet to stored states, beside the bare forward on rows in memory."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.timing import Ratio, Work, interleaved, ratio
from pipeline.allocator import freed_memory_kept
from pipeline.batch import Batch
from pipeline.devices import CPU, device_named
from pipeline.flow.tap import quiet
from pipeline.job import load_job
from pipeline.job_sections import Numerics
from pipeline.loading import Loaded, load
from pipeline.measuring.task import MeasureTask
from pipeline.numerics import in_force
from pipeline.plan import make_plan
from pipeline.registry import sources
from pipeline.resolve import resolve
from pipeline.running import Running
from pipeline.store import Store, open_store
from pipeline.task import run_task

JOB = """
name = "path"
[numerics]
batch_rows = {batch_rows}
threads = {threads}
[data.rows]
url = "rows"
classes = 10
train = "train"
measure = ["test"]
[data.rows.columns]
features = "x"
label = "label"
split = "split"
shape = {shape}
[[models]]
family = "{family}"
data = "rows"
seeds = {seeds}
hyperparameters = {hyperparameters}
training = {{ steps = 1, batch_rows = 16 }}
{statistics}
"""
FIRST = ("response", "labels", "exemplars")
# of the rows per second of the bare forward, and of the forward with the same statistics, on rows in memory
SHARE = 0.85
# 8 models on one reading must be so much faster than on 8
GROUP = 1.5


@dataclass(frozen=True)
class Figure:
    """One figure: what it is, its value with the quartiles of the rounds, and the least that is asked of it."""

    name: str
    ratio: Ratio
    rows_per_s: float
    least: float | None

    @property
    def within(self) -> bool:
        """Whether it is as good as asked for."""
        return self.least is None or self.ratio.wall >= self.least


@dataclass(frozen=True)
class World:
    """A store in a directory with trained models, and the one task that measures all of them."""

    store: Store
    task: MeasureTask

    def measure(self, *tasks: MeasureTask) -> None:
        """Do tasks from the start: no state is stored yet, models are in memory."""
        for key in self.store.keys("states/"):
            self.store.remove(key)
        for task in tasks:
            receipt = run_task(task, self.store)
            if receipt.failed or receipt.unread or receipt.lost:
                raise RuntimeError(f"a task came to nothing: {receipt}")

    def batches(self) -> list[list[Batch]]:
        """Every row that the task measures, by chunk."""
        probe = self.task.probe
        source = sources()[probe.spec.source](probe.data, probe.spec, self.store)
        chunks = {cell.chunk.id: cell.chunk for cell in self.task.cells}.values()
        return [list(source.read(chunk, self.task.numerics.batch_rows)) for chunk in chunks]

    def loaded(self) -> list[Loaded]:
        """The models of the task."""
        first = {cell.model.id: cell.model for cell in self.task.cells}.values()
        place = device_named(CPU)
        return [load(one, self.task.probe, self.task.sites, self.store, place) for one in first]


def world(
    folder: Path, *, rows: int, shape: Sequence[int], family: str, hyperparameters: str, models: int, batch_rows: int,
    threads: int, statistics: Sequence[str], chunks: int = 1,
) -> World:  # fmt: skip
    """Rows at random in chunks of `rows` behind the first, and models that took one step on some others."""
    draw = np.random.default_rng(0)
    (folder / "rows").mkdir()
    # the first chunk of a run is where models are looked at, and their statistics timed, once
    for number, splits in enumerate([["train"] * 32 + ["test"] * 16, *[["test"] * rows] * chunks]):
        x = draw.normal(size=(len(splits), int(np.prod(shape)))).astype(np.float32)
        columns = {
            "x": pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1]),
            "label": draw.integers(0, 10, len(splits)),
            "split": splits,
        }
        path = folder / "rows" / f"{number}.parquet"
        pq.write_table(pa.table(columns), path, compression="zstd", row_group_size=max(256, rows // 8))
    job = folder / "job.toml"
    job.write_text(
        JOB.format(
            shape=list(shape), family=family, hyperparameters=hyperparameters, seeds=list(range(models)),
            batch_rows=batch_rows, threads=threads, statistics="\n".join(f"[statistics.{one}]" for one in statistics),
        )
    )  # fmt: skip
    store = open_store(str(folder / "store"))
    plan = make_plan(resolve(load_job(job), store), store, workers=1)
    for task in plan.train:
        run_task(task, store)
    # without the untrained twins
    trained = [cell for task in plan.measure for cell in task.cells if cell.model.control_of is None]
    cells = tuple(cell for cell in trained if cell.chunk != plan.measure[0].probe.chunk)
    return World(store, replace(plan.measure[0], cells=cells))


def figures(*, seconds: float, rounds: int, threads: int) -> Iterator[Figure]:
    """The whole path of a model of realistic cost, and a group of small ones."""
    # as the table of overhead.py has them, and as a job has them unless it says otherwise
    for batch_rows in (64, Numerics().batch_rows):
        with tempfile.TemporaryDirectory() as folder:
            yield from _share(Path(folder), batch_rows, seconds=seconds, rounds=rounds, threads=threads)
    with tempfile.TemporaryDirectory() as folder:
        yield _group(Path(folder), seconds=seconds, rounds=rounds, threads=threads)


def _share(folder: Path, batch_rows: int, *, seconds: float, rounds: int, threads: int) -> Iterator[Figure]:
    # states of one chunk are stored while the next is measured; of a job's, 65,536 rows, one alone takes ten minutes
    rows, chunks = 1024, 2
    made = world(
        folder, rows=rows, chunks=chunks, shape=(3, 32, 32), family="resnet", models=1, batch_rows=batch_rows,
        threads=threads, statistics=FIRST,
        hyperparameters='{ depth = 18, widths = [64, 128, 256, 512], shortcut = "B" }',
    )  # fmt: skip
    batches, (loaded,) = made.batches(), made.loaded()

    def forward(_: int) -> None:
        with in_force(made.task.numerics), quiet(loaded.module):
            for of_chunk in batches:
                for batch in of_chunk:
                    batch.forward(loaded.module)

    def in_memory(_: int) -> None:
        task = made.task
        with in_force(task.numerics):
            for of_chunk in batches:
                running = Running(
                    loaded.discovery, task.cells[0].statistics, task.classes, task.kernel, loaded.forwards
                )
                for batch in of_chunk:
                    running.add(loaded.module, batch)
                running.finish(loaded.module)

    works: dict[str, Work] = {
        "forward": forward, "memory": in_memory, "path": lambda _: made.measure(made.task)
    }  # fmt: skip
    # as a worker does from one task to the next, see `measuring/run.py`
    with freed_memory_kept():
        passes = interleaved(works, seconds=seconds, rounds=rounds)
    speed = chunks * rows / median(passes["path"].wall)
    for name, over in (("the bare forward's rows/s", "forward"), ("the same statistics' rows/s in memory", "memory")):
        yield Figure(
            f"whole path of resnet-18 in batches of {batch_rows}, with {', '.join(FIRST)}: share of {name}",
            ratio(passes[over], passes["path"]),
            speed,
            SHARE,
        )


def _group(folder: Path, *, seconds: float, rounds: int, threads: int) -> Figure:
    rows, models = 20_000, 8
    made = world(
        folder, rows=rows, shape=(3072,), family="mlp", models=models, batch_rows=1024, threads=threads,
        hyperparameters="{ widths = [8] }", statistics=("response",),
    )  # fmt: skip
    ids = made.task.models
    alone = [made.task.without(set(ids) - {model}) for model in ids]
    passes = interleaved(
        {"together": lambda _: made.measure(made.task), "alone": lambda _: made.measure(*alone)},
        seconds=seconds,
        rounds=rounds,
    )
    name = f"{models} small models on one reading: times as fast as on {models} readings"
    return Figure(name, ratio(passes["alone"], passes["together"]), rows / median(passes["together"].wall), GROUP)


@dataclass(frozen=True)
class Start:
    """Seconds that a new worker takes: to import what a task needs, to load its first model, to find it again."""

    imports_s: float
    first_load_s: float
    cached_load_s: float


def start(threads: int) -> Start:
    """Time a new worker's first steps; a model's load finds its sites on a probe batch."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import pipeline.task, pipeline.store"], check=True)
    imports = time.perf_counter() - begin
    with tempfile.TemporaryDirectory() as folder:
        made = world(
            Path(folder), rows=64, shape=(3, 32, 32), family="resnet", models=1, batch_rows=64, threads=threads,
            hyperparameters='{ depth = 18, widths = [64, 128, 256, 512], shortcut = "B" }', statistics=FIRST,
        )  # fmt: skip
        loads = []
        for _ in range(2):
            begin = time.perf_counter()
            made.loaded()
            loads.append(time.perf_counter() - begin)
    return Start(imports, *loads)
