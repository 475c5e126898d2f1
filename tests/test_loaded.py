"""Jobs whose models were made elsewhere, from files to committed tables."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from pipeline.cli import cli
from pipeline.cluster.executor import ray_executor
from pipeline.estimate import estimate
from pipeline.executor import InlineExecutor
from pipeline.gc import find_garbage
from pipeline.hashing import sha256
from pipeline.job import load_job
from pipeline.job_sections import Resources
from pipeline.models.base import decode_checkpoint
from pipeline.plan import make_plan
from pipeline.query import ask, connect
from pipeline.resolve import resolve
from pipeline.run import run
from pipeline.store import open_store
from pipeline.verify import verify_runs
from tests.census import published
from tests.loaded import exported, job_of, put, table, take, weights


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Two good checkpoints in different forms, one truncated, one that lacks a weight, one of another width."""
    models = tmp_path / "models"
    put(models / "a.safetensors", weights(0))
    torch.save(weights(1), models / "b.pt")
    put(models / "cut.safetensors", put(models / "cut.safetensors", weights(2))[:-100])
    lacking = weights(3)
    del lacking["hidden0.bias"]
    put(models / "lacking.safetensors", lacking)
    put(models / "wide.safetensors", weights(4, widths=(7,)))
    return tmp_path


def test_what_is_wrong_with_one_model_costs_no_other(mixed: Path) -> None:
    store = open_store(str(mixed / "store"))
    outcome = take(job_of(mixed), store)
    assert (outcome.loaded, outcome.trained) == (3, 0)  # two and their twin
    assert sorted(outcome.failed) == ["cut", "lacking", "wide"]
    size = (mixed / "models" / "cut.safetensors").stat().st_size
    said = f"models/cut.safetensors cannot be read: it is damaged, or cut off at its {size} bytes: SafetensorError: "
    assert outcome.failed["cut"].startswith(said)
    assert outcome.failed["lacking"] == "models/lacking.safetensors does not fit the model: 1 missing: hidden0.bias"
    assert "hidden0.weight is (7, 64), expected (6, 64)" in outcome.failed["wide"]
    models = table(store, outcome.run, "models").set_index("name")
    assert list(models.loc[["a", "b", "mlp-init"], "status"]) == ["ok"] * 3
    assert models.loc["wide", "reason"] == outcome.failed["wide"]
    assert models.loc["a", "loaded_from"] == "models/a.safetensors"
    assert models.loc["a", "control"] == models.loc["b", "control"] == models.loc["mlp-init", "model"]
    assert models.loc["mlp-init", "control_of"] is not None
    assert models["lineage"].isna().all()
    key = f"models/{models.loc['a', 'model']}.safetensors"
    assert models.loc["a", "sha256"] == sha256(store.get(key))
    assert torch.equal(decode_checkpoint(store.get(key)).weights["hidden0.weight"], weights(0)["hidden0.weight"])
    again = take(job_of(mixed), store)
    assert (again.run, again.new, again.failed) == (outcome.run, False, outcome.failed)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_numbers_that_are_none_cost_their_own_units_alone(tmp_path: Path, wrong: float) -> None:
    spoilt = weights(1)
    spoilt["hidden0.weight"][2, 5] = wrong
    put(tmp_path / "models" / "spoilt.safetensors", spoilt)
    put(tmp_path / "models" / "whole.safetensors", weights(0))
    job = load_job(job_of(tmp_path)).model_copy(update={"statistics": {}})  # all of them
    store = open_store(str(tmp_path / "store"))
    outcome = run(job, store, InlineExecutor())
    assert outcome.failed == {}
    neurons = table(store, outcome.run, "neurons").merge(table(store, outcome.run, "models")[["model", "name"]])
    defined = neurons[neurons.site == "hidden0"].set_index(["name", "unit"]).sort_index().template_cos.notna()
    assert defined.loc["whole"].all()
    assert defined.loc["spoilt"].tolist() == [unit != 2 for unit in range(6)]


@pytest.mark.real
def test_ray_loads_the_same_models_and_fails_the_same(mixed: Path, ray_cluster: str) -> None:
    path = job_of(mixed)
    put(mixed / "programs" / "m.pt2", exported())
    programs = "[[models]]\ndata = 'digits'\nload = { url = 'programs' }\n[statistics.response]"
    path.write_text(path.read_text().replace("[statistics.response]", programs))
    here, there = (open_store(str(mixed / name)) for name in ("here", "there"))
    outcome = take(path, here)
    with ray_executor(ray_cluster, Resources(workers=2)) as executor:
        other = run(load_job(path), there, executor)
    assert (other.loaded, sorted(other.failed)) == (4, ["cut", "lacking", "wide"])
    assert (other.run, other.failed) == (outcome.run, outcome.failed)
    assert published(there, other.run) == published(here, outcome.run)


def test_the_command_line_says_what_failed_and_exits_with_1(mixed: Path) -> None:
    found = CliRunner().invoke(
        cli, ["run", str(job_of(mixed)), "--ray", "none", "--store", str(mixed / "store")], env={"COLUMNS": "200"}
    )
    assert found.exit_code == 1
    assert "0 models trained, 3 loaded" in found.output
    # what models that failed will never have is neither stored nor to do
    assert "measure: 6 to do" in found.output
    assert (
        "failed: wide: models/wide.safetensors does not fit the model: 3 of another shape: hidden0.weight"
        in found.output
    )
    planned = CliRunner().invoke(cli, ["plan", str(job_of(mixed)), "--store", str(mixed / "store")])
    assert planned.exit_code == 0
    assert [line.split()[-4:] for line in planned.output.splitlines() if "models to load" in line] == [
        ["6", "3", "3", "3"]
    ]


def test_one_checkpoint_more_computes_its_cells_alone(mixed: Path) -> None:
    store = open_store(str(mixed / "store"))
    before = take(job_of(mixed), store)
    put(mixed / "models" / "aa.safetensors", weights(7))
    grown = take(job_of(mixed), store)
    statistics = 2
    assert (grown.loaded, grown.cells) == (1, statistics)
    assert grown.run != before.run
    fresh_store = open_store(str(mixed / "fresh"))
    fresh = take(job_of(mixed), fresh_store)
    assert fresh.cells == before.cells + statistics
    assert published(store, grown.run) == published(fresh_store, fresh.run)


def test_reading_planning_verifying_and_cleaning_know_loaded_models(mixed: Path) -> None:
    store = open_store(str(mixed / "store"))
    outcome = take(job_of(mixed), store)
    assert all(report.problems == () for report in verify_runs(store, deep=True))
    assert not [one for one in find_garbage(store) if one.key.startswith(("models/", "states/"))]
    with connect(store) as con:
        sql = "SELECT count(*), count(DISTINCT model) FROM neurons JOIN models USING (model) WHERE control IS NOT NULL"
        assert list(ask(con, sql).rows) == [(2 * 16, 2)]
        assert list(ask(con, "SELECT count(*) FROM neurons WHERE twin_cos IS NOT NULL").rows) == [(0,)]
    shown = CliRunner().invoke(cli, ["show", "b/hidden0/3", "--store", store.url])
    assert shown.exit_code == 0, shown.output
    assert "untrained" in shown.output
    assert "mlp, loaded from models/b.pt; model" in shown.output
    failed = CliRunner().invoke(cli, ["show", "wide/hidden0/3", "--store", store.url])
    assert failed.exit_code == 2
    assert "was not measured, it failed: models/wide.safetensors does not fit" in failed.output
    resolved = resolve(load_job(job_of(mixed)), store)
    assert [len(one.models) for one in estimate(resolved, store).shapes] == [6]
    plan = make_plan(resolved, store, workers=2)
    assert pickle.loads(pickle.dumps(plan.load)) == plan.load
    assert (plan.loads, plan.missing_cells) == (6, 3 * 2)
    assert plan.state_bytes > 0
    assert outcome.reused_cells == 0
