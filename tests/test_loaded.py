"""Jobs whose models were made elsewhere, from files to committed tables."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from torch import nn

from pipeline.cli import cli
from pipeline.cluster.executor import ray_executor
from pipeline.errors import CensusError, DataError, JobError
from pipeline.estimate import estimate
from pipeline.executor import InlineExecutor
from pipeline.filesystems import filesystem
from pipeline.gc import find_garbage
from pipeline.hashing import sha256
from pipeline.job import Resources, load_job
from pipeline.manifest import manifest_key
from pipeline.models.base import Task, decode_checkpoint
from pipeline.plan import make_plan
from pipeline.query import ask, connect
from pipeline.resolve import resolve
from pipeline.run import run
from pipeline.store import Store, open_store
from pipeline.verify import verify_runs
from tests.census import published
from tests.models.build import build

TASK = Task((1, 8, 8), 10)
JOB = """
name = "loaded"
[data.digits]
source = "digits"
chunk_rows = 400
[[models]]
data = "digits"
{keys}
load = {{ {load} }}
[statistics.response]
[statistics.weights]
"""
MLP = "family = 'mlp', arguments = { widths = [6] }"


def job_of(directory: Path, load: str = f"url = 'models/*', {MLP}", keys: str = "") -> Path:
    path = directory / "job.toml"
    path.write_text(JOB.format(load=load, keys=keys))
    return path


def weights(seed: int, family: str = "mlp", **parameters: Any) -> dict[str, torch.Tensor]:
    parameters = parameters or {"widths": (6,)}
    return {name: value.clone() for name, value in build(family, TASK, seed=seed, **parameters).state_dict().items()}


def put(path: Path, state: dict[str, torch.Tensor] | bytes) -> bytes:
    content = state if isinstance(state, bytes) else safetensors.torch.save(state)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return content


def take(path: Path, store: Store) -> Any:
    return run(load_job(path), store, InlineExecutor())


def table(store: Store, run_id: str, name: str) -> pd.DataFrame:
    content = store.get(f"runs/{run_id}/tables/{name}/part-00000.parquet")
    return pq.read_table(io.BytesIO(content)).to_pandas()


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
    assert "cut.safetensors cannot be read" in outcome.failed["cut"]
    assert outcome.failed["lacking"] == "lacking.safetensors does not fit the model: 1 missing: hidden0.bias"
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


def exported() -> bytes:
    buffer = io.BytesIO()
    model, rows = build("mlp", TASK, seed=3, widths=(6,)).eval(), torch.export.Dim.DYNAMIC
    torch.export.save(torch.export.export(model, (torch.randn(3, 1, 8, 8),), dynamic_shapes=({0: rows},)), buffer)
    return buffer.getvalue()


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
    assert "failed: wide: wide.safetensors does not fit the model: 3 of another shape: hidden0.weight" in found.output
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
    assert "was not measured, it failed: wide.safetensors does not fit" in failed.output
    resolved = resolve(load_job(job_of(mixed)), store)
    assert [len(one.models) for one in estimate(resolved, store).shapes] == [6]
    plan = make_plan(resolved, store, workers=2)
    assert pickle.loads(pickle.dumps(plan.load)) == plan.load
    assert (plan.loads, plan.missing_cells) == (6, 3 * 2)
    assert plan.state_bytes > 0
    assert outcome.reused_cells == 0


def test_files_may_be_gone_once_they_are_in_the_store(tmp_path: Path) -> None:
    put(tmp_path / "models" / "a.safetensors", weights(0))
    store = open_store(str(tmp_path / "store"))
    resolved = resolve(load_job(job_of(tmp_path)), store)
    (tmp_path / "models" / "a.safetensors").unlink()
    with pytest.raises(DataError, match="no such file"):
        take(job_of(tmp_path), store)
    assert resolved.models[0].name == "a"


class Replacing(InlineExecutor):
    """Lets somebody replace a file after it was named, before it is read."""

    def __init__(self, path: Path, content: bytes) -> None:
        self.path, self.content = path, content

    def map(self, function, tasks):
        if tasks and type(tasks[0]).__name__ == "LoadTask":
            self.path.write_bytes(self.content)
        return super().map(function, tasks)


def test_a_file_that_changes_under_a_run_leaves_it_open(tmp_path: Path) -> None:
    path = tmp_path / "models" / "a.safetensors"
    put(path, weights(0))
    other = put(tmp_path / "other.safetensors", weights(1))
    store = open_store(str(tmp_path / "store"))
    with pytest.raises(DataError, match=r"a: .*its sha256 is .* it was changed; run again"):
        run(load_job(job_of(tmp_path)), store, Replacing(path, other))
    outcome = take(job_of(tmp_path), store)
    assert (outcome.loaded, outcome.failed) == (1, {})


def test_files_of_the_same_content_are_one_model(tmp_path: Path) -> None:
    for name in ("last", "best"):
        put(tmp_path / "models" / f"{name}.safetensors", weights(0))
    store = open_store(str(tmp_path / "store"))
    models = table(store, take(job_of(tmp_path), store).run, "models").set_index("name")
    assert sorted(models.index) == ["best", "mlp-init"]
    assert models.loc["best", "loaded_from"] == "models/best.safetensors, models/last.safetensors"


def test_files_that_differ_in_their_endings_alone_are_told_apart_by_them(tmp_path: Path) -> None:
    put(tmp_path / "models" / "a.safetensors", weights(0))
    torch.save(weights(1), tmp_path / "models" / "a.pt")
    put(tmp_path / "models" / "b.1.safetensors", weights(2))
    put(tmp_path / "models" / "b.2.safetensors", weights(3))
    resolved = resolve(load_job(job_of(tmp_path)), open_store(str(tmp_path / "store")))
    assert [one.name for one in resolved.models] == ["a.pt", "a.safetensors", "b.1", "b.2", "mlp-init"]
    assert len({one.id for one in resolved.models}) == 5


def test_what_a_store_held_before_changes_no_byte_of_a_run(tmp_path: Path) -> None:
    for name in ("a", "b"):
        put(tmp_path / f"{name}.safetensors", weights(0))
    used, fresh = (open_store(str(tmp_path / name)) for name in ("used", "fresh"))
    take(job_of(tmp_path, f"url = 'a.safetensors', {MLP}"), used)
    runs = [take(job_of(tmp_path, f"url = 'b.safetensors', {MLP}"), store).run for store in (used, fresh)]
    assert used.get(manifest_key(runs[0])) == fresh.get(manifest_key(runs[1]))


def test_an_untrained_twin_is_named_by_all_that_decides_its_weights(tmp_path: Path) -> None:
    put(tmp_path / "c.safetensors", weights(0, "cnn", widths=(4, 4)))
    load = "url = 'c.safetensors', family = 'cnn', arguments = { widths = [4, 4] }"

    def ids(numerics: str) -> dict[str, str]:
        path = job_of(tmp_path, load)
        path.write_text(f"{path.read_text()}[numerics]\n{numerics}\n")
        return {one.name: one.id for one in resolve(load_job(path), open_store(str(tmp_path / "store"))).models}

    batches, threads, same = ids("batch_rows = 64"), ids("threads = 2"), ids("dtype = 'float64'")
    plain = ids("")
    assert plain["cnn-init"] == same["cnn-init"]
    assert len({one["cnn-init"] for one in (plain, batches, threads)}) == 3, "what its BatchNorm sees, and how"
    assert len({one["c"] for one in (plain, batches, threads, same)}) == 1


WRONG = [
    ("url = 'models/*', family = 'mpl'", "", "[models[0].load] family = \"mpl\": unknown; did you mean 'mlp'?"),
    ("url = 'models/*', famly = 'mlp'", "", "[models[0].load] famly: unknown key; did you mean 'family'?"),
    (f"{MLP}", "", "[models[0].load] url is missing: expected url = … (file, directory or glob"),
    ("url = 'models/*', family = 'mlp', arguments = { width = 3 }", "", "width: unknown key; did you mean 'widths'?"),
    ("url = 'models/*', family = 'mlp', arguments = { widths = 3 }", "", "[models[0].load.arguments] widths = 3: exp"),
    ("url = 'models/*', family = 'tcn'", "", "[models[0].load] family tcn takes series, the data has image"),
    ("url = 'models/*'", "", "[models[0].load] a file of weights alone says nothing of its model: name load.family"),
    ("url = 'models/*', builder = 'os:system'", "", "load.builder = 'os:system': package os is not allowed"),
    ("url = 'models/*', builder = 'pipeline.no:No'", "", "[models[0].load] pipeline.no cannot be imported on "),
    ("url = 'models/*', builder = 'torch.nn:Linear', family = 'mlp'", "", "expected it only without family"),
    (f"url = 'models/*', sha256 = '{'0' * 64}', {MLP}", "", "expected the sha256 of what is there, "),
    (f"url = 'models/*', sha256 = 'abc', {MLP}", "", '[models[0].load] sha256 = "abc": expected String should match'),
    (f"url = 'nowhere/*', {MLP}", "", "/nowhere/*: there is no such file or directory; expected at least one m"),
    (f"url = 'nowhere/*', {MLP}", "", "job.toml:9: [models[0].load] /"),
    (f"url = 's3://key:hunter2@x/y', {MLP}", "", "[models[0]] load.url must not hold credentials"),
    (f"url = 'models/*', {MLP}", "seeds = [1]", "[models[0]] seeds says how to train: expected it or load, not both"),
]


@pytest.mark.parametrize(("load", "keys", "said"), WRONG)
def test_a_table_that_cannot_be_is_refused_before_anything_is_done(
    tmp_path: Path, load: str, keys: str, said: str
) -> None:
    put(tmp_path / "models" / "a.safetensors", weights(0))
    store = open_store(str(tmp_path / "store"))
    with pytest.raises(CensusError) as caught:
        resolve(load_job(job_of(tmp_path, load, keys)), store)
    assert said in str(caught.value)
    assert caught.value.exit_code == 2
    assert "hunter2" not in str(caught.value)
    assert not store.keys("runs/")


def test_a_pin_that_fits_is_accepted(tmp_path: Path) -> None:
    pin = sha256(put(tmp_path / "models" / "a.safetensors", weights(0)))
    job = load_job(job_of(tmp_path, f"url = 'models/*', sha256 = '{pin}', {MLP}"))
    assert [one.name for one in resolve(job, open_store(str(tmp_path / "store"))).models] == ["a", "mlp-init"]


def test_a_glob_is_pinned_as_one(tmp_path: Path) -> None:
    lines = [
        f"{sha256(put(tmp_path / 'models' / f'{name}.safetensors', weights(seed)))}  {name}.safetensors\n"
        for seed, name in enumerate("ab")
    ]
    pin = sha256("".join(lines).encode())
    job = load_job(job_of(tmp_path, f"url = 'models/*', sha256 = '{pin}', {MLP}"))
    store = open_store(str(tmp_path / "store"))
    assert [one.name for one in resolve(job, store).models] == ["a", "b", "mlp-init"]
    put(tmp_path / "models" / "b.safetensors", weights(5))
    with pytest.raises(JobError, match=r"\[models\[0\].load\] sha256 = .*: expected the sha256 of what is there, "):
        resolve(job, store)


def test_names_of_entries_tell_their_models_apart(tmp_path: Path) -> None:
    for seed, folder in enumerate(("left", "right")):
        put(tmp_path / folder / "a.safetensors", weights(seed))
    path = job_of(tmp_path, f"url = 'left', {MLP}")
    second = f"[[models]]\ndata = 'digits'\nload = {{ url = 'right', {MLP} }}\n[statistics.response]"
    path.write_text(path.read_text().replace("[statistics.response]", second))
    store = open_store(str(tmp_path / "store"))
    with pytest.raises(JobError, match="'a' and 'a' have the same name: give their entries different names"):
        resolve(load_job(path), store)
    path.write_text(path.read_text().replace("load = { url = 'right'", "name = 'second'\nload = { url = 'right'"))
    assert [one.name for one in resolve(load_job(path), store).models] == ["a", "mlp-init", "second-a"]


def test_models_lie_in_a_bucket(tmp_path: Path, s3_url: str) -> None:
    fs, root = filesystem(f"{s3_url}/zoo")
    for seed in range(2):
        fs.pipe_file(f"{root}/{seed}.safetensors", safetensors.torch.save(weights(seed)))
    store = open_store(s3_url)
    outcome = take(job_of(tmp_path, f"url = '{s3_url}/zoo/*.safetensors', {MLP}"), store)
    assert (outcome.loaded, outcome.failed) == (3, {})
    assert len(store.keys("data/digests/")) == 1
    models = table(store, outcome.run, "models").set_index("name")
    assert models.loc["1", "loaded_from"] == f"{s3_url}/zoo/1.safetensors"


def test_what_was_hashed_is_not_read_again(tmp_path: Path, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fs, root = filesystem(f"{s3_url}/zoo")
    for seed in range(2):
        fs.pipe_file(f"{root}/{seed}.safetensors", safetensors.torch.save(weights(seed)))
    job = load_job(job_of(tmp_path, f"url = '{s3_url}/zoo/*.safetensors', {MLP}"))
    store = open_store(s3_url)
    first = resolve(job, store)
    first.findings.release()
    read: list[str] = []
    monkeypatch.setattr("pipeline.foreign.digests.digests_of", lambda model: read.append(model.name) or {"x": "y"})
    assert resolve(job, store).run == first.run
    fs.pipe_file(f"{root}/1.safetensors", safetensors.torch.save(weights(5)))
    monkeypatch.undo()
    assert resolve(job, store).run != first.run
    assert read == []


def test_a_file_written_just_now_is_read_again(tmp_path: Path) -> None:
    put(tmp_path / "models" / "a.safetensors", weights(0))
    store = open_store(str(tmp_path / "store"))
    resolve(load_job(job_of(tmp_path)), store).findings.release()
    assert [json.loads(store.get(key)) for key in store.keys("data/digests/")] in ([], [{}])


class Uninitialised(nn.Linear):
    """Leaves its weights as the memory has them."""

    def reset_parameters(self) -> None:
        pass


class Normed(nn.Module):
    """A norm with running statistics behind a layer, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.out = nn.Linear(64, 5), nn.BatchNorm1d(5), nn.Linear(5, 10)

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = torch.relu(self.norm(self.layer(pixels.flatten(1))))
        return {"hidden": hidden, "logits": self.out(hidden)}


def builder(name: str, **arguments: Any) -> str:
    given = ", ".join(f"{key} = {value}" for key, value in arguments.items())
    return f"url = 'models/*', builder = 'tests.test_loaded:{name}', arguments = {{ {given} }}"


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURON_CENSUS_PACKAGES", "tests")


def test_a_twin_has_norms_of_the_data_and_class_scores_are_found(allowed: None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    put(tmp_path / "models" / "a.safetensors", dict(Normed().state_dict()))
    store = open_store(str(tmp_path / "store"))
    outcome = take(job_of(tmp_path, builder("Normed")), store)
    assert outcome.failed == {}
    models = table(store, outcome.run, "models").set_index("name")
    twin = decode_checkpoint(store.get(f"models/{models.loc['Normed-init', 'model']}.safetensors")).weights
    assert not torch.equal(twin["norm.running_mean"], torch.zeros(5))
    assert (twin["norm.running_var"] - 1).abs().min() > 0.1
    scores = table(store, outcome.run, "scores")
    assert set(scores["metric"]) == {"accuracy", "log_loss"}
    assert models.loc["a", "family"] == "tests.test_loaded:Normed"


def test_a_model_without_known_initialisers_has_no_twin(allowed: None, tmp_path: Path) -> None:
    put(tmp_path / "models" / "a.safetensors", dict(nn.Linear(8, 4).state_dict()))
    job = load_job(job_of(tmp_path, builder("Uninitialised", in_features=8, out_features=4)))
    (model,) = resolve(job, open_store(str(tmp_path / "store"))).models
    assert model.control is None


def test_a_program_is_measured_and_has_no_twin(tmp_path: Path) -> None:
    put(tmp_path / "models" / "cut.pt2", put(tmp_path / "models" / "m.pt2", exported())[:-50])
    store = open_store(str(tmp_path / "store"))
    outcome = take(job_of(tmp_path, "url = 'models'"), store)
    assert list(outcome.failed) == ["cut"]
    assert (outcome.loaded, outcome.cells) == (1, 2)
    neurons, models = (table(store, outcome.run, name) for name in ("neurons", "models"))
    assert len(neurons) == 16
    assert models["control"].isna().all()
    assert sorted(table(store, outcome.run, "sites")["kind"]) == ["dense", "dense"]


def test_a_model_that_refuses_the_rows_is_recorded_and_costs_no_other(allowed: None, tmp_path: Path) -> None:
    put(tmp_path / "models" / "a.safetensors", dict(Normed().state_dict()))
    path = job_of(tmp_path, f"{builder('Normed')}, inputs = ['image']", keys="control = false")
    outcome = take(path, open_store(str(tmp_path / "store")))
    assert list(outcome.failed) == ["a"]
    assert "its forward does not take (image): " in outcome.failed["a"]
    assert "load.inputs can name what rows give it" in outcome.failed["a"]
    named = job_of(tmp_path, f"{builder('Normed')}, inputs = ['pixels']")
    assert take(named, open_store(str(tmp_path / "store"))).failed == {}


class Narrow(Normed):
    """Takes fewer numbers than a row has."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(63, 5)


def test_a_model_that_breaks_on_the_rows_is_recorded_and_so_is_its_twin(allowed: None, tmp_path: Path) -> None:
    put(tmp_path / "models" / "a.safetensors", dict(Narrow().state_dict()))
    outcome = take(job_of(tmp_path, builder("Narrow")), open_store(str(tmp_path / "store")))
    assert sorted(outcome.failed) == ["Narrow-init", "a"]
    assert all("mat1 and mat2 shapes cannot be multiplied" in reason for reason in outcome.failed.values())
