"""What a job will take: unit costs that are measured, and the arithmetic on them."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

import pipeline.estimate
from pipeline.cli import cli
from pipeline.cost import Cost
from pipeline.estimate import Estimate, ReadingCost, ShapeCost, estimate
from pipeline.plan import make_plan
from pipeline.resolve import resolve
from pipeline.store import open_store
from tests.census import CNN, small_job, write_job


def test_units_are_measured_for_each_shape_and_agree_with_the_plan(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    resolved = resolve(small_job(tmp_path, seeds="0, 1", more=CNN), store)
    found = estimate(resolved, store)
    assert [(one.data, one.bytes) for one in found.reading] == [("digits", 64 * 4 + 8 + 8)]
    # a seed or a step of training changes no shape
    assert [len(one.models) for one in found.shapes] == [4, 2]
    assert {model for one in found.shapes for model in one.models} == {model.id for model in resolved.models}
    for one in found.shapes:
        assert (
            min(one.forward_s, one.start_s, one.store_s, one.merge_s, one.finish_s)
            > 0
            <= min(one.statistics_s, one.begin_s)
        )
    # the plan counts tensors, an object has a header as well
    planned = make_plan(resolved, store, workers=1).state_bytes
    chunks = sum(len(split.chunks) for split in resolved.splits)
    stored = chunks * sum(one.state_bytes * len(one.models) for one in found.shapes)
    assert planned < stored < 1.2 * planned
    assert not store.keys("states/")


def test_what_a_batch_costs_is_shared_among_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(tmp_path / "store"))
    batch = Cost(rows=128, forward=2.0, measured=5.0, passes=1)
    monkeypatch.setattr(pipeline.estimate, "cost_of", lambda *_, **__: batch)
    found = estimate(resolve(small_job(tmp_path), store), store).shapes[0]
    assert (found.rows, found.forward_s, found.statistics_s) == (128, 2 / 128, 3 / 128)
    assert found.ratio == 2.5


def test_seconds_are_rows_and_chunks_times_units(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    resolved = resolve(small_job(tmp_path), store)
    models = tuple(model.id for model in resolved.models)
    units = Estimate(
        (ReadingCost("digits", rows=128, s=1.0, bytes=272),),
        (
            ShapeCost(
                "digits",
                "mlp-0",
                models,
                128,
                10.0,
                100.0,
                begin_s=6.0,
                start_s=0.5,
                store_s=0.25,
                state_bytes=1,
                merge_s=0,
                finish_s=0,
            ),
        ),
        resolved.kernel,
    )
    rows, chunks = 1797, 5
    sizes = [chunk for split in resolved.splits for chunk in split.chunks]
    plan = make_plan(resolved, store, workers=1)
    assert units.seconds(plan, workers=1) == pytest.approx(
        {
            "reading": rows,
            "forward": 2 * rows * 10,
            # a chunk of three batches or more has all of its beginning, a smaller one a part
            "statistics": 2 * (rows * 100 + 6 * sum(min(1, chunk.rows / 384) for chunk in sizes)),
            "start": 2 * 0.5,
            "storing": 2 * chunks * 0.25,
        }
    )


def test_the_command_says_what_the_statistics_cost(tmp_path: Path) -> None:
    job = write_job(tmp_path / "job.toml")
    result = CliRunner().invoke(cli, ["plan", str(job), "--estimate", "--store", str(tmp_path / "store")])
    assert result.exit_code == 0, result.output
    for text in ("not committed yet", "with statistics ×", "Left to measure: ", "on 1 such worker,"):
        assert text in result.stdout
