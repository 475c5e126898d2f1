"""The answers to the questions that every census answers, from tables whose numbers are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.hashing import digest
from pipeline.report.questions import QUESTIONS
from pipeline.store import Store, open_store
from tests.asked import opened
from tests.handmade import CLASSES, write_run

Row = dict[str, Any]


def answer(store: Store, name: str, **options: Any) -> list[Row]:
    """The answer to a named question, its rows by column."""
    with opened(store, **options) as con:
        return con.sql(QUESTIONS[name].sql).to_arrow_table().to_pylist()  # type: ignore[no-any-return]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


@pytest.mark.parametrize("later", [{"template_cos": 0.5}, {"split": "train"}])
@pytest.mark.parametrize("name", ["patterns", "families"])
def test_the_untrained_twin_is_that_of_the_same_run(store: Store, name: str, later: Row) -> None:
    write_run(store, "a")
    # a twin that several models share: a run of another one of them measures it on other rows, or another split
    write_run(store, "b", ("mlp-0-init",), change=later)
    rows = answer(store, name)
    assert rows == answer(store, name, run="a")
    assert [(row["before"], row["after"], row["share_raised"]) for row in rows] == [(0.25, 0.75, 1.0)] * 2


@pytest.mark.parametrize("name", ["patterns", "detectors"])
@pytest.mark.parametrize(
    ("splits", "chosen"), [(("train", "test"), "test"), (("train", "val"), "val"), (("train",), "train")]
)
def test_test_rows_are_preferred_and_training_rows_come_last(
    store: Store, name: str, splits: tuple[str, ...], chosen: str
) -> None:
    write_run(store, "a", splits=splits)
    assert {row["measured_on"] for row in answer(store, name)} == {f"digits/{chosen}"}


def test_models_of_runs_that_measured_other_splits_are_all_there(store: Store) -> None:
    write_run(store, "a", ("mlp-0", "mlp-0-init"), splits=("test",))
    write_run(store, "b", ("cnn-0", "cnn-0-init"), splits=("train",))
    write_run(store, "c", ("mlp-1", "mlp-1-init"), splits=("val",))
    found = [(row["family"], row["site"], row["units"], row["measured_on"]) for row in answer(store, "patterns")]
    assert found == [
        ("cnn", "layers.0", 3, "digits/train"),
        ("cnn", "head", 3, "digits/train"),
        ("mlp", "layers.0", 3, "digits/test"),
        ("mlp", "layers.0", 3, "digits/val"),
        ("mlp", "head", 3, "digits/test"),
        ("mlp", "head", 3, "digits/val"),
    ]
    # one winner of each class for each split, whose rows are others
    detectors = {(row["class"], row["model"], row["measured_on"]) for row in answer(store, "detectors")}
    models = {"digits/test": "mlp-0", "digits/train": "cnn-0", "digits/val": "mlp-1"}
    assert detectors == {(number, model, split) for split, model in models.items() for number in range(CLASSES)}
    families = [(row["family"], row["count"]) for row in answer(store, "families")]
    assert families == [("cnn", 3), ("cnn", 3), ("mlp", 6), ("mlp", 6)]
    # of the mlps' equal units, those of the first
    assert {row["neuron"].partition("/")[0] for row in answer(store, "words")} == {"cnn-0", "mlp-0"}


def test_models_of_one_name_are_told_apart_by_their_runs(store: Store) -> None:
    write_run(store, "first-of-two")
    # a training under another recipe has another id and the same name
    anew = dict.fromkeys(("models", "sites", "neurons", "patterns", "classes"), other_model)
    write_run(store, "second-of-two", ("mlp-0", "mlp-0-init", "cnn-0", "cnn-0-init"), edit=anew, tables=tuple(anew))
    idle = [(row["model"], row["site"], row["units"], row["dead"], row["dead_units"]) for row in answer(store, "idle")]
    assert idle == [
        ("cnn-0", "layers.0", 4, 1, "1"),
        ("mlp-0 (run first-of)", "layers.0", 4, 1, "1"),
        ("mlp-0 (run second-o)", "layers.0", 4, 1, "1"),
    ]
    assert {row["model"] for row in answer(store, "detectors")} == {"cnn-0"}
    neurons = {row["neuron"] for row in answer(store, "words")}
    assert neurons == {
        *(f"cnn-0/layers.0/{unit}" for unit in (0, 2, 3)),
        *(f"mlp-0/layers.0/{unit} (run first-of)" for unit in (0, 2, 3)),
    }
    # of one run there is nothing to tell apart
    for name in ("idle", "detectors"):
        assert {row["model"] for row in answer(store, name, run="first")} == {"mlp-0"}


def other_model(row: Row) -> list[Row]:
    ids = {key: row[key] and digest([row[key], "other"]) for key in ("model", "control") if key in row}
    return [{**row, **ids}]
