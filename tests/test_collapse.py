"""Has the last layer collapsed? From the tables as from raw activations, and only where the tables can tell."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from sklearn.datasets import load_digits
from torch import nn

from pipeline.hashing import splitmix64
from pipeline.models.base import decode_checkpoint
from pipeline.report.answers import print_question
from pipeline.report.questions import QUESTIONS
from pipeline.sources.digits import GREATEST, TEST_BELOW
from pipeline.store import Store, open_store
from tests.asked import opened
from tests.census import CNN, write_job
from tests.handmade import write_run
from tests.loaded import put, take

Array = np.ndarray
Row = dict[str, Any]

# what a classifier of digits may see of twelve units
CONVOLVED = ("greatest", "mean", "flat")
DENSE = ("nothing", "zero", "layernorm", "batchnorm", "doubled", "tanh", "small", "flipped", "sum", "nine")


class Headed(nn.Module):
    """Twelve units, a classifier, and something between them."""

    def __init__(self, between: str) -> None:
        super().__init__()
        self.between = between
        self.layer = nn.Conv2d(1, 12, 5) if between in CONVOLVED else nn.Linear(64, 12)
        self.norm = nn.BatchNorm1d(12) if between == "batchnorm" else nn.LayerNorm(12)
        self.out = nn.Linear(12 * 16 if between == "flat" else 12, 9 if between == "nine" else 10)
        if between == "zero":
            for parameter in self.out.parameters():
                nn.init.zeros_(parameter)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the classifier sees."""
        if self.between in CONVOLVED:
            h = torch.relu(self.layer(pixels.view(-1, 1, 8, 8)))
            return {"greatest": h.amax((2, 3)), "mean": h.mean((2, 3)), "flat": h.flatten(1)}[self.between]
        h = torch.relu(self.layer(pixels.view(-1, 64)))
        match self.between:
            case "layernorm" | "batchnorm":
                return self.norm(h)  # type: ignore[no-any-return]
            case "doubled":
                return 2 * h
            case "tanh":
                return torch.tanh(h)
            case "small":
                return torch.tanh(h / 8)
            case "flipped":
                return h.flip(1)
            case "sum":
                return h + pixels.view(-1, 64)[:, 20:32]
        return h

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.out(self.features(pixels))
        # of nine outputs the tenth class is the one of score 0
        return nn.functional.pad(scores, (0, 1)) if self.between == "nine" else scores


JOB = """
name = "headed"
[data.digits]
source = "digits"
[statistics.template]
sample_rows = 64
[statistics.labels]
"""
ENTRY = """
[[models]]
name = "{0}"
data = "digits"
load = {{ url = "{0}.safetensors", builder = "tests.test_collapse:Headed", arguments = {{ between = "{0}" }} }}
"""


def answer(store: Store, **options: Any) -> list[Row]:
    with opened(store, **options) as con:
        return con.sql(QUESTIONS["collapse"].sql).to_arrow_table().to_pylist()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def measured_rows() -> tuple[torch.Tensor, Array]:
    """Images of the test rows, and their classes."""
    image_NP, label_N = load_digits(return_X_y=True)
    chosen = [uid for uid in range(len(label_N)) if splitmix64(uid) < TEST_BELOW]
    return torch.from_numpy((image_NP[chosen] / GREATEST).astype(np.float32)), label_N[chosen]


def collapse(x_ND: Array, label_N: Array, weight_CD: Array) -> tuple[float, float, float]:
    """NC1 to NC3 from the inputs of a classifier."""
    mean_CD = np.stack([x_ND[label_N == label].mean(0) for label in range(10)])
    m_CD = mean_CD - mean_CD.mean(0)
    within = ((x_ND - mean_CD[label_N]) ** 2).sum()
    between = (m_CD[label_N] ** 2).sum()
    cosine_CC = cosines(m_CD, m_CD)
    return within / between, cosine_CC[np.triu_indices(10, 1)].std(), np.diag(cosines(weight_CD, m_CD)).mean()


def cosines(one_CD: Array, other_CD: Array) -> Array:
    with np.errstate(invalid="ignore"):
        return one_CD @ other_CD.T / np.linalg.norm(one_CD, axis=1)[:, None] / np.linalg.norm(other_CD, axis=1)


def test_only_classifiers_that_see_a_rows_greatest_outputs_are_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, measured_rows: tuple[torch.Tensor, Array]
) -> None:
    monkeypatch.setenv("NEURON_CENSUS_PACKAGES", "tests")
    text = JOB
    for between in (*CONVOLVED, *DENSE):
        torch.manual_seed(1)
        made = Headed(between)
        if between == "zero":
            made.out.reset_parameters()
        put(tmp_path / f"{between}.safetensors", dict(made.state_dict()))
        text += ENTRY.format(between)
    (tmp_path / "job.toml").write_text(text)
    store = open_store(str(tmp_path / "store"))
    outcome = take(tmp_path / "job.toml", store)
    assert outcome.failed == {}
    found = {row["model"]: row for row in answer(store)}
    assert sorted(found) == ["greatest-greatest", "nothing-nothing", "zero-zero"]
    with opened(store) as con:
        ids = dict(con.sql("SELECT name, model FROM models").fetchall())
    x, label_N = measured_rows
    for between in ("greatest", "nothing", "zero"):
        row = found[f"{between}-{between}"]
        assert (row["data"], row["split"]) == ("digits", "test")
        for name, suffix in ((f"{between}-{between}", ""), (f"{between}-init", "_before")):
            model = Headed(between)
            model.load_state_dict(decode_checkpoint(store.get(f"models/{ids[name]}.safetensors")).weights)
            with torch.no_grad():
                x_ND = model.double().features(x.double()).numpy()
            expected = collapse(x_ND, label_N, model.out.weight.detach().numpy())
            # a classifier of zeros has no direction
            assert [row[f"nc{k}{suffix}"] for k in (1, 2, 3)] == pytest.approx(
                expected, rel=1e-4, abs=1e-6, nan_ok=(between, suffix) == ("zero", "_before")
            )


LABELS = "[statistics.labels]\n"
NUMBERS = ("nc1", "nc1_before", "nc2", "nc2_before", "nc3", "nc3_before")


def test_before_is_the_twin_of_the_same_run_and_names_are_told_apart(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))

    def run(steps: int, rates: str, split: str) -> str:
        text = write_job(tmp_path / "job.toml", more=CNN).read_text()
        for old, new in (
            ("training = { steps = 30 }", f"training = {{ steps = {steps} }}\ngrid = {{ learning_rate = {rates} }}"),
            ('measure = ["test", "train"]', f'measure = ["{split}"]'),
        ):
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "job.toml").write_text(text + LABELS)
        return str(take(tmp_path / "job.toml", store).run)

    both = run(20, "[0.05, 0.01]", "test")
    of_both = {row["model"]: row for row in answer(store)}
    # one of them again on other rows, and with it the twin that they share
    again = run(20, "[0.05]", "train")
    longer = run(30, "[0.01]", "test")
    rows = {(row["model"], row["split"]): row for row in answer(store)}
    first, second = "mlp-learning_rate=0.01-0", "mlp-learning_rate=0.05-0"
    told = (f"{first} (run {both[:8]})", f"{first} (run {longer[:8]})")
    assert sorted(rows) == sorted([(told[0], "test"), (told[1], "test"), (second, "train")])
    assert {row["data"] for row in rows.values()} == {"digits"}
    (alone,) = answer(store, run=again)
    for row, expected in ((rows[told[0], "test"], of_both[first]), (rows[second, "train"], alone)):
        assert [row[name] for name in NUMBERS] == pytest.approx([expected[name] for name in NUMBERS])
    assert rows[second, "train"]["nc1_before"] != of_both[second]["nc1_before"]


@pytest.mark.parametrize(
    ("tables", "missing"),
    [
        (("models", "sites", "neurons", "classes"), "patterns.weight"),
        (("models", "sites", "neurons", "patterns"), "classes.a_mean"),
    ],
)
def test_it_is_said_what_was_not_measured(tmp_path: Path, tables: tuple[str, ...], missing: str) -> None:
    store = open_store(str(tmp_path))
    write_run(store, "a", tables=tables)
    sink = io.StringIO()
    with opened(store) as con:
        print_question(con, QUESTIONS["collapse"], Console(file=sink, width=100), limit=0)
    assert f"not measured: the question needs the columns {missing}" in sink.getvalue()
