"""Models that are no family's: made by a builder, or exported programs, and their twins."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from pipeline.errors import CensusError, JobError
from pipeline.job import load_job
from pipeline.models.base import decode_checkpoint
from pipeline.registry import sources
from pipeline.resolve import resolve
from pipeline.store import open_store
from tests.loaded import exported, job_of, put, table, take


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
    return f"url = 'models/*', builder = 'tests.test_loaded_builders:{name}', arguments = {{ {given} }}"


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURON_CENSUS_PACKAGES", "tests")


def test_a_twin_has_norms_of_the_data_and_class_scores_are_found(allowed: None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    put(tmp_path / "models" / "a.safetensors", dict(Normed().state_dict()))
    store = open_store(str(tmp_path / "store"))
    job = job_of(tmp_path, builder("Normed"))
    outcome = take(job, store)
    assert outcome.failed == {}
    models = table(store, outcome.run, "models").set_index("name")
    twin = decode_checkpoint(store.get(f"models/{models.loc['Normed-init', 'model']}.safetensors")).weights
    read = resolve(load_job(job), store)
    source = sources()["digits"]("digits", read.job.data["digits"], store)
    pixels = torch.cat([batch.inputs[0] for one in source.chunks("train") for batch in source.read(one, 256)])
    assert len(pixels) > source.chunks("train")[0].rows
    seen = functional.linear(pixels.flatten(1), twin["layer.weight"], twin["layer.bias"])
    torch.testing.assert_close(twin["norm.running_mean"], seen.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(twin["norm.running_var"], seen.var(0), rtol=1e-5, atol=1e-6)
    scores = table(store, outcome.run, "scores")
    assert set(scores["metric"]) == {"accuracy", "log_loss"}
    assert models.loc["a", "family"] == "tests.test_loaded_builders:Normed"


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


class Wide(nn.Module):
    """As wide as it is asked to be."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(64, width), nn.Linear(width, 10)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.layer(pixels.flatten(1))))


def test_twins_of_one_builder_with_other_arguments_are_told_apart_by_the_entries_names(
    allowed: None, tmp_path: Path
) -> None:
    load = "url = '{0}.safetensors', builder = 'tests.test_loaded_builders:Wide', arguments = {{ width = {0} }}"
    for width in (4, 5):
        put(tmp_path / f"{width}.safetensors", dict(Wide(width).state_dict()))
    path = job_of(tmp_path, load.format(4))
    second = f"[[models]]\ndata = 'digits'\nload = {{ {load.format(5)} }}\n[statistics.response]"
    path.write_text(path.read_text().replace("[statistics.response]", second))
    store = open_store(str(tmp_path / "store"))
    said = (
        r"job.toml:10: \[models\[1\]\] its untrained twin 'Wide-init' has the same name as 'Wide-init' of "
        r"\[models\[0\]\], .*job.toml:6: give each entry a name of its own, name = …, with which"
    )
    with pytest.raises(JobError, match=said):
        resolve(load_job(path), store)
    path.write_text(path.read_text().replace("load = { url = '5", "name = 'five'\nload = { url = '5"))
    assert [one.name for one in resolve(load_job(path), store).models] == ["4", "Wide-init", "five-5", "five-init"]


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


class Leaving(Normed):
    """Ends the program instead of answering."""

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        sys.exit(3)


class Interrupted(Normed):
    """Meets an interruption from the keyboard."""

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        raise KeyboardInterrupt


class Unmade(Normed):
    """Ends the program while it is made."""

    def __init__(self) -> None:
        sys.exit(4)


def test_a_model_that_would_end_the_program_has_failed(allowed: None, tmp_path: Path) -> None:
    put(tmp_path / "models" / "a.safetensors", dict(Leaving().state_dict()))
    outcome = take(job_of(tmp_path, builder("Leaving"), keys="control = false"), open_store(str(tmp_path / "store")))
    assert outcome.failed == {"a": "the forward failed: RuntimeError: it would end the program (SystemExit: 3)"}
    with pytest.raises(KeyboardInterrupt):
        take(job_of(tmp_path, builder("Interrupted"), keys="control = false"), open_store(str(tmp_path / "store")))
    with pytest.raises(
        CensusError, match=r"job.toml:\d+: \[models\[0\].load\] .* cannot be built of {}: SystemExit: 4"
    ):
        take(job_of(tmp_path, builder("Unmade")), open_store(str(tmp_path / "store")))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tests.test_loaded_builders:Nromed", "no subclass of torch.nn.Module of that name; did you mean 'Normed'"),
        ("test.test_loaded_builders:Normed", "package test is not allowed; did you mean 'tests'"),
    ],
)
def test_the_nearest_builder_is_named(allowed: None, tmp_path: Path, name: str, said: str) -> None:
    put(tmp_path / "models" / "a.safetensors", dict(Normed().state_dict()))
    with pytest.raises(CensusError, match=re.escape(said)):
        take(job_of(tmp_path, f"url = 'models/*', builder = '{name}'"), open_store(str(tmp_path / "store")))
