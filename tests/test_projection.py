"""From unit costs to a larger census: what is waited for, what grows with what, and the bottleneck by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline.cli import cli
from pipeline.estimate import Estimate, ReadingCost, ShapeCost
from pipeline.plan import make_plan
from pipeline.projection import CALL_S, Overheads, Target, overheads, project, target_of
from pipeline.resolve import resolve
from pipeline.store import open_store
from tests.census import small_job, write_job


def shape(models: int, *, scale: float) -> ShapeCost:
    ids = tuple(str(number) for number in range(models))
    return ShapeCost(
        data="d",
        model="m",
        models=ids,
        rows=128,
        forward_s=1e-6 * scale,
        statistics_s=2e-6 * scale,
        begin_s=0.1 * scale,
        start_s=0.5 * scale,
        store_s=0.01 * scale,
        state_bytes=round(1000 * scale),
        merge_s=0.02 * scale,
        finish_s=4.0 * scale,
    )


# three models of one shape and one of another that costs five times as much: on average twice the first
UNITS = Estimate((ReadingCost("d", 128, 1e-6, 100.0),), (shape(3, scale=1), shape(1, scale=5)), "reference")
COSTS = Overheads(request_s=0.02, cell_s=1e-4)
TARGET = Target(models=1000, rows=100_000_000, workers=64, chunk_rows=1_000_000, statistics=9, speed=10)


def test_every_part_is_its_unit_times_what_there_is_of_it() -> None:
    found = project(UNITS, COSTS, TARGET)
    chunks, groups = 100, 125
    cells, tasks = 1000 * chunks, groups * 100
    requests = 2 * cells * 9 + 12 * 1000
    assert (found.requests, found.state_bytes, TARGET.tasks) == (requests, cells * 2000, tasks)
    assert found.seconds == pytest.approx(
        {
            "reading": groups * 1e8 * 1e-6 / 64,
            "forward": 1000 * 1e8 * 2e-6 / 64 / 10,
            "statistics": 1000 * (1e8 * 4e-6 + chunks * 0.2) / 64 / 10,
            "finding sites": 1000 * 8 * 1.0 / 64,
            "encoding and merging states": cells * 0.06 / 64,
            "store requests": requests * 0.02 / 64,
            "tables and packing": 1000 * 8.0 / 64,
            "driver": cells * 1e-4 + tasks * CALL_S + 2000 * 0.02 / 16,
        }
    )
    assert found.bottleneck == "statistics"
    beside = found.seconds["reading"]
    assert found.total_s == pytest.approx(sum(found.seconds.values()) - beside)


@pytest.mark.parametrize(
    ("change", "bottleneck"),
    [
        ({"chunk_rows": 10_000_000, "speed": 1000.0}, "reading"),
        ({"chunk_rows": 1000, "speed": 1000.0}, "store requests"),
        ({"chunk_rows": 1000, "speed": 1000.0, "workers": 100_000}, "driver"),
        ({"models": 8, "rows": 1000, "chunk_rows": 1000}, "tables and packing"),
    ],
)
def test_the_bottleneck_moves(change: dict[str, float], bottleneck: str) -> None:
    assert project(UNITS, COSTS, dataclasses.replace(TARGET, **change)).bottleneck == bottleneck


def test_workers_share_everything_but_the_driver() -> None:
    one, two = (project(UNITS, COSTS, dataclasses.replace(TARGET, workers=number)).seconds for number in (32, 64))
    assert {name for name in one if two[name] == pytest.approx(one[name] / 2)} == one.keys() - {"driver"}
    assert two["driver"] == pytest.approx(one["driver"])


def test_what_is_not_asked_for_is_the_plans(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    plan = make_plan(resolve(small_job(tmp_path), store), store, workers=1)
    target = target_of(plan, models=None, rows=None, chunk_rows=None, workers=3, speed=1)
    assert target == Target(models=2, rows=1797, workers=3, chunk_rows=400, statistics=3)
    found = overheads(plan, store)
    assert 0 < found.cell_s < 0.1
    assert 0 < found.request_s < 1
    assert not store.keys("states/")


def test_the_command_names_the_bottleneck(tmp_path: Path) -> None:
    job = write_job(tmp_path / "job.toml")
    larger = ["--models", "1000", "--rows", "100_000_000", "--chunk-rows", "65_536", "--gpus", "64", "--speed", "50"]
    result = CliRunner().invoke(cli, ["plan", str(job), *larger, "--store", str(tmp_path / "store")])
    assert result.exit_code == 0, result.output
    shown = " ".join(result.stdout.split())
    assert "for 1,000 models × 100,000,000 rows in chunks of 65,536, on 64 workers that are each 50 ×" in shown
    assert "The bottleneck is " in shown
    for part in ("reading", "forward", "statistics", "store requests", "tables and packing", "driver"):
        assert part in shown
