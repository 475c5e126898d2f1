"""Grids in a job: which models they stand for, how those are called, and what is refused."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch

from pipeline.errors import JobError
from pipeline.executor import InlineExecutor
from pipeline.fit.settings import Training
from pipeline.grid import label, points
from pipeline.hashing import digest
from pipeline.job import MAX_SEED, SEED_STEP, Job, job_identity, load_job
from pipeline.models.base import checkpoint_key, decode_checkpoint
from pipeline.query import ask, connect
from pipeline.registry import families
from pipeline.resolve import Resolved, resolve
from pipeline.run import run
from pipeline.store import open_store
from tests.census import small_job

ENTRY = """
name = "grid"
[data.digits]
source = "digits"
[[models]]
family = "mlp"
data = "digits"
{entry}
"""


def job(folder: Path, entry: str) -> Job:
    path = folder / "job.toml"
    path.write_text(ENTRY.format(entry=entry))
    return load_job(path)


def resolved(folder: Path, entry: str) -> Resolved:
    return resolve(job(folder, entry), open_store(str(folder / "store")))


@pytest.mark.parametrize(
    ("own", "of_job", "largest"), [(2**63 - 1, 0, 2**63 - 1), (675_344, MAX_SEED // SEED_STEP, 675_344)]
)
def test_seeds_of_models_are_refused_beyond_what_a_column_holds(
    own: int, of_job: int, largest: int, tmp_path: Path
) -> None:
    def seeded(seed: int) -> Job:
        return small_job(tmp_path, seeds=f"0, {seed}").model_copy(update={"seed": of_job})

    store = open_store(str(tmp_path / "store"))
    assert max(model.origin.seed for model in resolve(seeded(own), store).models) == 2**63 - 1
    expected = rf"job\.toml:\d+: \[models\[0\]\] seeds\[1\] = {own + 1}: expected {largest} or less, as .* {of_job}$"
    with pytest.raises(JobError, match=expected):
        resolve(seeded(own + 1), store)
    assert not store.keys("")


def test_a_grid_is_every_combination_with_every_seed(tmp_path: Path):
    found = resolved(
        tmp_path,
        "seeds = 2\ncontrol = false\ngrid = { widths = [[16], [32, 16]], learning_rate = [0.1, 0.01] }\n"
        "training = { steps = 9 }",
    )
    settings = {
        model.name: (model.origin.hyperparameters["widths"], model.origin.settings.learning_rate, model.origin.seed)
        for model in found.models
    }
    assert settings == {
        f"mlp-widths={name},learning_rate={rate}-{seed}": (widths, rate, seed)
        for name, widths in (("16", [16]), ("32x16", [32, 16]))
        for rate in (0.1, 0.01)
        for seed in (0, 1)
    }
    assert {model.origin.steps for model in found.models} == {9}
    assert len({model.id for model in found.models}) == 8


def test_learning_rates_of_one_shape_train_together(tmp_path: Path):
    found = resolved(tmp_path, "hyperparameters = { widths = [16] }\ngrid = { learning_rate = [0.1, 0.01, 0.001] }")
    # 16 × 10 weights fill whole cache lines, and 64 × 16
    assert len({model.origin.group for model in found.models}) == 1
    assert len({model.origin.lineage for model in found.models}) == 3


def test_trainings_that_begin_with_the_same_weights_share_their_untrained_twin(tmp_path: Path):
    grid = "learning_rate = [0.1, 0.01], steps = [5, 9], held_out = [0.0, 0.25], gate = ['relu', 'tanh']"
    found = resolved(tmp_path, f"hyperparameters = {{ widths = [16] }}\nseeds = 2\ngrid = {{ {grid} }}").models
    twins = {model.id: model for model in found if model.control_of is not None}
    # gate and seed decide the weights, what is held out the rows that they are scored on
    assert len(twins) == 2 * 2 * 2
    assert len(found) == 2 * 2 * 2 * 2 * 2 + len(twins)
    for model in (model for model in found if model.id not in twins):
        twin = twins[model.control or ""]
        assert twin.origin.beginning == model.origin.beginning
        assert twin.id == twin.origin.model_id(0)
        assert (twin.origin.seed, twin.origin.hyperparameters) == (model.origin.seed, model.origin.hyperparameters)


def test_what_begins_alike_is_the_same_model(tmp_path: Path):
    store = open_store(str(tmp_path / "store"))
    run(
        job(
            tmp_path,
            "hyperparameters = { widths = [16] }\ntraining = { steps = 5 }\n"
            "grid = { learning_rate = [0.1, 0.01], momentum = [0.9, 0.0] }\n[statistics.weights]",
        ),
        store,
        InlineExecutor(),
    )
    with closing(connect(store, tables={"models", "neurons"})) as con:
        models = list(ask(con, "SELECT model, control, lineage FROM models WHERE control_of IS NULL").rows)
        cosines = list(ask(con, "SELECT count(twin_cos), min(twin_cos) FROM neurons JOIN models USING (model)").rows)
    assert len(models) == 4
    assert len({control for _, control, _ in models}) == 1
    begun = [decode_checkpoint(store.get(checkpoint_key(digest([lineage, 0])))) for _, _, lineage in models]
    for other in begun[1:]:
        assert all(torch.equal(value, other.weights[name]) for name, value in begun[0].weights.items())
    ((count, least),) = cosines
    assert count == 4 * (16 + 10)
    assert 0.5 < least <= 1


def test_several_grids_are_a_list(tmp_path: Path):
    found = resolved(
        tmp_path,
        "control = false\n[[models.grid]]\ngate = ['relu', 'tanh']\n[[models.grid]]\nsteps = [7]\nwidths = [[8]]",
    )
    assert [model.name for model in found.models] == ["mlp-gate=relu-0", "mlp-gate=tanh-0", "mlp-steps=7,widths=8-0"]


def test_a_number_of_seeds_is_those_from_0(tmp_path: Path):
    assert job_identity(job(tmp_path, "seeds = 3")) == job_identity(job(tmp_path, "seeds = [0, 1, 2]"))
    with pytest.raises(JobError, match=r"seeds = 0: expected how many from 1, or an array of seeds \(one "):
        job(tmp_path, "seeds = 0")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("seeds = []", r"\[models\[0\]\] seeds = \[\]: expected how many from 1, or an array of seeds \(one model f"),
        ("seeds = -1", r"\[models\[0\]\] seeds = -1: expected how many from 1, or an array of seeds \(one model f"),
        ("grid = { learning_rate = [] }", r"\] grid = .*: expected an array of one or more values of learning_rate$"),
        ("grid = { learning_rate = 0.1 }", r"\] grid = .*: expected an array of one or more values of learning_rate$"),
        (
            f"training = {{ steps = {10**21} }}",
            r"training\] steps = 10{21}: expected less than or equal to 2147483647$",
        ),
        (f"grid = {{ steps = [{10**21}] }}", r"grid\] steps = 10{21}: expected less than or equal to 2147483647$"),
        (
            "grid = { learning_rat = [0.1] }",
            r"\[models\[0\].grid\] learning_rat: unknown key; did you mean 'learning_r",
        ),
        (
            "grid = { learning_rate = [0.1, -1.0] }",
            r"\[models\[0\].grid\] learning_rate = -1.0: expected greater than 0",
        ),
        ("grid = { neighbours = [3] }", r"\[models\[0\].grid\] neighbours = 3: expected an array"),
        ("training = { neighbours = [3] }", r"toml:5: \[models\[0\]\] family mlp draws no neighbours"),
        (
            "training = { autocast = 'float16' }\n[numerics]\ndtype = 'float64'",
            r"toml:5: \[models\[0\]\] training.autocast lowers float32 alone: leave it out, or numerics.dtype",
        ),
        ("grid = { gate = ['rleu'] }", r"\[models\[0\].grid\] gate = \"rleu\": expected 'relu', 'gelu' or 'tanh'"),
        (f"hyperparameters = {{ widths = [{10**17}] }}", r"\[models\[0\]\] it cannot be built: .{9,120}$"),
        (f"hyperparameters = {{ widths = [{10**21}] }}", r"\[models\[0\]\] it cannot be built: .{9,120}$"),
        ("grid = { steps = [5, 5] }", r"its model 'mlp-steps=5-0' has the same id as another one of the entry: give"),
        (
            "grid = { steps = [5, 9] }\ntraining = { steps = 7 }",
            r"\[models\[0\].training\] steps = 7: expected no value here, as the grid has some",
        ),
    ],
)
def test_what_a_grid_gets_wrong_is_named(tmp_path: Path, entry: str, message: str):
    with pytest.raises(JobError, match=message):
        resolved(tmp_path, entry)


def test_no_family_has_a_hyperparameter_that_training_has_too():
    for family in families().values():
        assert not family.parameters.model_fields.keys() & Training.model_fields.keys()


def test_a_grid_without_values_sets_nothing():
    assert points([]) == ({},)
    assert label({}) == ""
    assert label({"checkpoints": (), "bias": True}) == "checkpoints=none,bias=true"


def test_of_a_grid_what_diverges_is_recorded_and_the_rest_is_measured(tmp_path: Path):
    grid = "hyperparameters = { widths = [16] }\ngrid = { learning_rate = [0.05, 1e30] }\ntraining = { steps = 20 }"
    store = open_store(str(tmp_path / "store"))
    outcome = run(job(tmp_path, grid + "\n[statistics.weights]"), store, InlineExecutor())
    diverged = "mlp-learning_rate=1e+30-0"
    assert set(outcome.failed) == {diverged}
    assert outcome.failed[diverged] == "diverged: the loss was not finite at step 2"
    with closing(connect(store, tables={"models", "neurons"})) as con:
        status = dict(ask(con, "SELECT name, status FROM models").rows)
        measured = {name for (name,) in ask(con, "SELECT DISTINCT name FROM neurons JOIN models USING (model)").rows}
    good = {"mlp-learning_rate=0.05-0", "mlp-learning_rate=0.05-0-init"}
    assert status == {**dict.fromkeys(good, "ok"), diverged: "failed"}
    assert measured == good
