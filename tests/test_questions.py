"""The answers to the questions that every census answers, from tables whose numbers are known."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from pipeline.hashing import digest
from pipeline.report.answers import print_question
from pipeline.report.questions import QUESTIONS
from pipeline.report.words import input_name
from pipeline.sites import NOT_FIRING
from pipeline.store import Store, open_store
from tests.asked import opened
from tests.handmade import CLASSES, model_id, write_run

Row = dict[str, Any]
SITE = "layers.0"  # the one that fires


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


@pytest.mark.parametrize("name", ["patterns", "families"])
def test_units_are_compared_with_their_twins_alone(store: Store, name: str) -> None:
    """With those of every model it would take minutes, of a thousand models."""
    write_run(store, "a", tuple(f"mlp-{number}{kind}" for number in range(150) for kind in ("", "-init")))
    with opened(store) as con:
        (rows,) = con.sql("SELECT count(*) FROM neurons").fetchall()[0]
        analysed = con.sql(f"EXPLAIN (ANALYZE, FORMAT JSON) {QUESTIONS[name].sql}").fetchall()[0][1]

    def made(operator: Row) -> list[int]:
        return [operator["intermediate_rows"], *(rows for one in operator.get("children", ()) for rows in made(one))]

    assert rows == 300 * 7
    (root,) = json.loads(analysed)["operator"]
    assert 150 * 6 <= max(made(root)) <= rows


def test_a_model_that_was_measured_on_two_data_sets_counts_once_on_each(store: Store) -> None:
    write_run(store, "a", data="digits")
    write_run(store, "b", data="letters")
    units = [(row["site"], row["units"], row["measured_on"]) for row in answer(store, "patterns")]
    assert units == [(site, 3, f"{data}/test") for site in (SITE, "head") for data in ("digits", "letters")]
    assert [(row["units"], row["count"]) for row in answer(store, "families")] == [("fire", 6), ("linear", 6)]


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


@pytest.mark.parametrize(
    "site",
    [
        {"input_kind": "pixels", "input_shape": [1, 3, 4]},
        {"input_kind": "pixels", "input_shape": [3, 2, 2]},
        {"input_kind": "pixels", "input_shape": [2, 2, 3, 1]},
        {"input_kind": "pixels", "input_shape": [4, 3]},
        {"input_kind": "pixels", "input_shape": [12]},
        {"input_kind": "lags", "input_shape": [4, 3]},
        {"input_kind": "lags", "input_shape": [1, 12]},
        {"input_kind": "features", "input_shape": [12]},
        {"input_kind": "residual", "input_shape": [12]},
        {"input_kind": "embeddings", "input_shape": [3, 4]},
        {"input_kind": None, "input_shape": [12]},
        {"input_kind": "features", "input_shape": [12], "input_names": [f"column {i}" for i in range(12)]},
    ],
)
def test_inputs_are_called_as_show_calls_them(store: Store, site: Row) -> None:
    weight = np.random.default_rng(0).permutation(np.linspace(-1, 1, 12))
    edit = {
        "sites": lambda row: [{**row, "input_names": None, **site, "fan_in": 12} if row["site"] == SITE else row],
        "patterns": lambda row: [{**row, "weight": list(weight)} if row["site"] == SITE else row],
    }
    write_run(store, "a", edit=edit)
    first = answer(store, "words")[0]
    order = np.argsort(weight)
    assert first["looks_for"] == "; ".join(input_name(site, index) for index in order[::-1][:3])
    assert first["not_for"] == "; ".join(input_name(site, index) for index in order[:3])


@pytest.mark.parametrize(
    ("weight", "looks_for", "not_for"),
    [
        ([0.5, -0.25, 0.0], "feature 0", "feature 1"),
        ([0.5, 0.25, 1.0], "feature 2; feature 0; feature 1", ""),
        ([-0.5, -0.25, -1.0], "", "feature 2; feature 0; feature 1"),
    ],
)
def test_looks_for_is_positive_and_not_for_negative(
    store: Store, weight: list[float], looks_for: str, not_for: str
) -> None:
    space = {"input_kind": "features", "input_shape": [3], "fan_in": 3}
    edit = {
        "sites": lambda row: [{**row, **space} if row["site"] == SITE else row],
        "patterns": lambda row: [{**row, "weight": weight} if row["site"] == SITE else row],
    }
    write_run(store, "a", edit=edit)
    assert {(row["looks_for"], row["not_for"]) for row in answer(store, "words")} == {(looks_for, not_for)}


def test_a_thing_that_stands_out_at_both_ends_is_said_once(store: Store) -> None:
    # of three things, all are among the greatest and among the smallest
    values = {"red": 2.0, "blue": 1.0, "green": -1.0}

    def things(row: Row) -> list[Row]:
        ends = (("greatest", list(values)), ("smallest", list(values)[::-1]))
        key = {name: row[name] for name in ("run", "model", "data", "site", "unit")}
        return [
            {**key, "kind": kind, "rank": rank, "input": thing, "value": values[thing]}
            for kind, names in ends
            for rank, thing in enumerate(names)
            if row["site"] == SITE
        ]

    tables = ("models", "sites", "neurons", "patterns", "meanings")
    write_run(store, "a", tables=tables, edit={"meanings": things})
    assert {(row["looks_for"], row["not_for"]) for row in answer(store, "words")} == {("red; blue", "green")}


def test_of_a_training_only_the_last_checkpoint_is_shown(store: Store) -> None:
    def with_checkpoints(row: Row) -> list[Row]:
        if row.get("name", "mlp-0") != "mlp-0" or row["model"] != model_id("mlp-0"):
            return [row]
        return [row, *({**row, **{key: value for key, value in made.items() if key in row}} for made in earlier)]

    earlier = [
        {"model": digest(name), "name": name, "step": step, "sha256": digest([name]), "template_cos": 0.9}
        for name, step in (("mlp-0@10", 10), ("mlp-0@50", 50))
    ]
    tables = ("models", "sites", "neurons", "patterns")
    write_run(store, "a", ("mlp-0", "mlp-0-init", "mlp-1"), edit=dict.fromkeys(tables, with_checkpoints), tables=tables)
    with opened(store) as con:
        assert con.sql("SELECT count(*) FROM models WHERE control_of IS NULL").fetchall() == [(4,)]
    assert {row["neuron"] for row in answer(store, "words")} == {f"mlp-0/{SITE}/{unit}" for unit in (0, 2, 3)}


def test_checkpoints_of_one_training_may_be_of_several_runs(store: Store) -> None:
    def earlier(row: Row) -> list[Row]:
        made = {"model": digest("early"), "name": "mlp-0@10", "step": 10, "sha256": digest(["early"])}
        return [{**row, **{key: value for key, value in made.items() if key in row}}]

    tables = ("models", "sites", "neurons", "patterns")
    write_run(store, "a", ("mlp-0",), edit=dict.fromkeys(tables, earlier), tables=tables)
    write_run(store, "b", ("mlp-0",), tables=tables)
    assert {row["neuron"] for row in answer(store, "words")} == {f"mlp-0/{SITE}/{unit}" for unit in (0, 2, 3)}


def test_loaded_models_are_each_their_own(store: Store) -> None:
    loaded = {"models": lambda row: [{**row, "lineage": None, "step": None}]}
    change = {"neurons": lambda row: [{**row, "template_cos": 0.5 + 0.25 * (row["model"] == model_id("mlp-1"))}]}
    write_run(store, "a", ("mlp-0", "mlp-1"), edit={**loaded, **change})
    found = [row["neuron"].partition("/")[0] for row in answer(store, "words")]
    assert found == ["mlp-1"] * 3
    write_run(store, "b", ("cnn-0", "cnn-1"), edit={**loaded, "neurons": lambda row: [row] * (row["unit"] == 0)})
    assert {row["neuron"] for row in answer(store, "words", run="b")} == {f"cnn-{n}/{SITE}/0" for n in (0, 1)}


def test_a_unit_of_a_model_on_two_data_sets_is_shown_once(store: Store) -> None:
    def better(row: Row) -> list[Row]:
        return [{**row, "template_cos": row["template_cos"] + 0.125 * (row["unit"] == 0)}]

    write_run(store, "a", data="digits")
    write_run(store, "b", data="letters", edit={"neurons": better})
    assert [(row["neuron"], row["cos"]) for row in answer(store, "words")] == [
        (f"mlp-0/{SITE}/0 (run b)", 0.875),
        (f"mlp-0/{SITE}/2 (run a)", 0.75),
        (f"mlp-0/{SITE}/3 (run a)", 0.75),
    ]


@pytest.mark.parametrize("gate", ["relu", "softmax", *sorted(NOT_FIRING)])
def test_units_fire_where_their_site_says_so_whatever_was_measured(store: Store, gate: str) -> None:
    edit = {"sites": lambda row: [{**row, "gate": gate} if row["site"] == SITE else row]}
    write_run(store, "a", edit=edit)
    found = {row["units"]: row["count"] for row in answer(store, "families")}
    assert found == ({"linear": 6} if gate in NOT_FIRING else {"fire": 3, "linear": 3})
    # where another run measured response, the column is there and null
    write_run(store, "b", edit=edit, change={"fire_rate": None})
    assert {row["units"]: row["count"] for row in answer(store, "families", run="b")} == found


def test_near_twins_are_each_unit_with_its_nearest_in_order(store: Store) -> None:
    # unit 2 is the nearest of 0, 1 and 3, and of 1 the cosine is undefined
    cosine = {0: 0.96, 1: float("nan"), 2: 0.97, 3: 0.97}

    def nearest(row: Row) -> list[Row]:
        return [{**row, "neighbour_unit": 3 if row["unit"] == 2 else 2, "neighbour_cos": cosine[row["unit"]]}]

    write_run(store, "a", edit={"neurons": nearest})
    (row,) = [row for row in answer(store, "idle") if row["site"] == SITE]
    assert (row["near_twins"], row["closest"]) == ("0~2 2~3", 0.97)


def test_where_every_model_failed_no_statistic_is_missed(store: Store) -> None:
    write_run(store, "a", (), failed={"mlp-0": "no forward"}, tables=("models",))
    console = Console(file=io.StringIO(), width=100)
    with opened(store) as con:
        print_question(con, QUESTIONS["words"], console, limit=0)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "no rows: no model was measured" in said
    assert "needs the columns" not in said
