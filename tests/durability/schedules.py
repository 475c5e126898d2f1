"""A job so small that a schedule of faults takes a fraction of a second, and what a schedule does with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import CensusError
from pipeline.executor import InlineExecutor, Lost
from pipeline.job import Job, load_job
from pipeline.manifest import decode, manifest_key
from pipeline.run import Outcome, run
from pipeline.store import Store
from pipeline.verify import verify_run
from tests.durability.world import Crash, FaultyStore, Weather, World

JOB = """
name = "tiny"
[data.tiny]
url = "rows"
classes = 2
chunk_rows = 12
measure = ["train"]
columns = { features = "x", label = "y", split = "split", shape = [3] }
[[models]]
family = "mlp"
data = "tiny"
hyperparameters = { widths = [4] }
training = { steps = 3 }
[statistics.labels]
"""
# after this many drivers the weather clears: what is left then must finish
DRIVERS = 8
RIVALS = 3


def tiny_job(directory: Path) -> Job:
    """Write rows and job, once: 36 rows in three chunks, one network and its untrained twin."""
    if not (directory / "job.toml").exists():
        random = np.random.default_rng(0)
        split = ["test" if row % 4 == 0 else "train" for row in range(36)]
        table = pa.table({"x": random.normal(size=(36, 3)).tolist(), "y": random.integers(0, 2, 36), "split": split})
        (directory / "rows").mkdir()
        pq.write_table(table, directory / "rows" / "0.parquet", row_group_size=12)
        (directory / "job.toml").write_text(JOB)
    return load_job(directory / "job.toml")


class Disorder:
    """An executor as bad as a cluster can be: any order, tasks twice, workers that die before, during or after one."""

    workers = 2

    def __init__(self, random: Random, likelihood: float) -> None:
        self._random = random
        self._likelihood = likelihood

    def map(self, function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        numbers = list(range(len(tasks)))
        self._random.shuffle(numbers)
        for number in numbers:
            yield number, self._done(function, tasks[number])

    def _done(self, function: Callable[[Any], Any], task: Any) -> Any:
        for _ in range(3):
            if self._random.random() < self._likelihood:
                continue
            try:
                receipt = function(task)
            except Crash:
                if self._random.random() < 0.5:
                    raise
                continue
            return receipt if self._random.random() > self._likelihood else function(task)
        return Lost("its worker died three times")


@dataclass(frozen=True)
class Finished:
    """What a schedule left: the world, and the outcomes that drivers reported."""

    world: World
    outcomes: tuple[Outcome, ...]


def play(seed: int, job: Job, world: World) -> Finished:
    """Run the job, driver after driver and some within others, until one says that the run is committed."""
    random = Random(seed)
    outcomes: list[Outcome] = []
    rivals = iter(range(RIVALS))

    def driver(name: str, likelihood: float) -> None:
        def rival() -> None:
            number = next(rivals, None)
            if number is not None:
                driver(f"{name}'s rival {number}", likelihood)

        weather = Weather(seed, name, likelihood)
        executor = Disorder(random, likelihood) if random.random() < 0.7 else InlineExecutor()
        try:
            outcomes.append(run(job, FaultyStore(world, weather, rival), executor))
            world.history.append(f"{name}: committed")
        except (Crash, CensusError) as error:
            world.history.append(f"{name}: ends with {type(error).__name__}: {error}")

    likelihood = random.choice([0.02, 0.05, 0.1, 0.2])
    for number in range(DRIVERS + 1):
        driver(f"driver {number}", likelihood if number < DRIVERS else 0.0)
        if outcomes:
            break
    world.deliver()
    return Finished(world, tuple(outcomes))


@cache
def undisturbed(directory: Path) -> tuple[str, dict[str, bytes]]:
    """The run id and every object, but its log, of a run to which nothing happened."""
    world = World()
    outcome = run(tiny_job(directory), calm(world), InlineExecutor())
    return outcome.run, kept(world)


def kept(world: World) -> dict[str, bytes]:
    """Every object but drivers' logs: each has its own, and one that was killed none."""
    return {key: content for key, content in world.objects.items() if "/log/" not in key}


def calm(world: World) -> Store:
    return FaultyStore(world, Weather(0, "calm", 0.0))


def check(finished: Finished, directory: Path) -> None:
    """One commit, every row in the ledger, every byte as if nothing had happened."""
    run_id, expected = undisturbed(directory)
    world = finished.world
    assert {outcome.run for outcome in finished.outcomes} == {run_id}
    assert world.commits[manifest_key(run_id)] == 1
    assert sorted(kept(world)) == sorted(expected)
    different = [key for key in expected if world.objects[key] != expected[key]]
    assert not different
    manifest = decode(world.objects[manifest_key(run_id)])
    assert verify_run(calm(world), manifest, deep=True).problems == ()
    assert manifest.coverage["tiny/train"].total == 36
    assert manifest.coverage["tiny/train"].read == 27
