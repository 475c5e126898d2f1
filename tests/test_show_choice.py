"""Which of several runs, models, data sets and splits is shown, where a name could mean more than one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline.query import Connection, QueryError, connect
from pipeline.report.neuron import page
from pipeline.show import TABLES, Listing, Neuron, find
from pipeline.store import Store, open_store
from tests.handmade import model_id, write_run
from tests.test_show import lines

EVERY = ("models", "sites", "neurons", "patterns", "exemplars", "classes", "meanings", "receipts")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


@contextmanager
def opened(store: Store) -> Iterator[Connection]:
    with closing(connect(store, tables=TABLES)) as con:
        yield con


def neuron(con: Connection, address: str = "mlp-0/layers.0/2", **chosen: Any) -> Neuron:
    found = find(con, address, **chosen)
    assert isinstance(found, Neuron)
    return found


def listing(con: Connection, address: str, **chosen: Any) -> Listing:
    found = find(con, address, **chosen)
    assert isinstance(found, Listing)
    return found


@pytest.mark.parametrize("splits", [("test",), ("train",)])
def test_the_untrained_twin_is_the_same_runs(store: Store, splits: tuple[str, ...]) -> None:
    write_run(store, "old")
    # the twin with another model that shares it, on other rows
    write_run(store, "young", ("mlp-0-init", "cnn-0"), splits=splits, change={"template_cos": 0.5})
    with opened(store) as con:
        twin = neuron(con).twin
        assert twin is not None
        assert (twin["run"], twin["template_cos"]) == ("old", 0.25)
        assert neuron(con, "mlp-0-init/layers.0/2").numbers["template_cos"] == 0.5


def test_what_is_shown_is_of_one_data_set(store: Store) -> None:
    for number, data in enumerate(("left", "right")):
        write_run(
            store,
            f"run{number}",
            data=data,
            tables=EVERY,
            change={"template_cos": 0.125 * (1 + number)},
            change_sites={"input_names": [f"{data} {place}" for place in range(16)]},
        )
    with opened(store) as con:
        for number, data in enumerate(("left", "right")):
            found = neuron(con, data=data)
            parts = (found.model, found.site, found.numbers, found.twin, found.pattern)
            of = {part["run"] for part in (*parts, *found.exemplars, *found.classes, *found.meanings) if part}
            assert of == {f"run{number}"}
            assert found.numbers["template_cos"] == 0.125 * (1 + number)
            assert found.site["input_names"][3] == f"{data} 3"
            assert [row["input"] for row in found.meanings] == [f"word of {data}"]
            sites = listing(con, "mlp-0", data=data)
            assert [row[0] for row in sites.rows] == ["layers.0", "head"]
            assert sites.title == f"mlp-0 ({model_id('mlp-0')}) on {data}: its sites"
            other = [{"left": "right", "right": "left"}[data] + "/test"]
            assert found.also_measured_on == sites.also_measured_on == other
        # without a choice, the latest run's
        assert neuron(con).numbers["data"] == "right"


def test_a_site_that_was_measured_on_one_data_set_alone_is_found(store: Store) -> None:
    write_run(store, "old", data="left")
    write_run(store, "young", data="right", change_sites={"site": "tail"}, change={"site": "tail"})
    with opened(store) as con:
        assert neuron(con, "mlp-0/head/1").numbers["data"] == "left"
        with pytest.raises(QueryError, match=r"model mlp-0 has no site 'heat': .*known: tail"):
            find(con, "mlp-0/heat/1")
        with pytest.raises(QueryError, match="model mlp-0 has no site 'head'"):
            find(con, "mlp-0/head/1", data="right")


@pytest.fixture
def namesakes(store: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Two models called mlp-0, one on digits and a later one on images."""
    write_run(store, "old", splits=("test", "val"))
    monkeypatch.setattr("tests.handmade.model_id", lambda name: model_id(f"another {name}"))
    write_run(store, "young", data="images")
    return store


def test_data_and_split_choose_among_models_of_one_name(namesakes: Store) -> None:
    with opened(namesakes) as con:
        assert neuron(con).model["run"] == "young"
        assert neuron(con, data="images").model["run"] == "young"
        for chosen in ({"data": "digits"}, {"split": "val"}):
            found = neuron(con, **chosen)
            assert (found.model["run"], found.numbers["run"], found.numbers["data"]) == ("old", "old", "digits")
            assert found.model["model"] == model_id("mlp-0")
        assert listing(con, "mlp-0", data="digits").title == f"mlp-0 ({model_id('mlp-0')}) on digits: its sites"
        assert listing(con, "mlp-0", split="val").title == f"mlp-0 ({model_id('mlp-0')}) on digits: its sites"
        with pytest.raises(QueryError, match="mlp-0 was not measured on data 'digts': did you mean 'digits'"):
            find(con, "mlp-0", data="digts")
        with pytest.raises(QueryError, match="data any, split dev: known: images/test, digits/test, digits/val"):
            find(con, "mlp-0/head/0", split="dev")


def test_other_models_of_the_name_are_named(namesakes: Store) -> None:
    young, old = model_id("another mlp-0")[:8], model_id("mlp-0")[:8]
    with opened(namesakes) as con:
        for address in ("mlp-0/layers.0/2", "mlp-0/layers.0", "mlp-0"):
            shown = lines(page(find(con, address), width=100, colour=False), width=100)
            assert f"another model of this name: {old} on digits (run old)" in shown
            shown = lines(page(find(con, address, data="digits"), width=100, colour=False), width=100)
            assert f"another model of this name: {young} on images (run young)" in shown
        shown = lines(page(neuron(con), width=100, colour=False), width=100)
        # by its name alone it may be another one tomorrow
        assert f"a row: neuron-census show {young}/layers.0/2 --row 1000" in shown
        assert neuron(con, f"{old}/layers.0/2").model["run"] == "old"


def test_what_bears_the_name_comes_before_what_is_called_otherwise_elsewhere(store: Store) -> None:
    write_run(store, "old", data="digits")
    write_run(store, "young", data="images", edit={"models": lambda row: [{**row, "name": f"renamed {row['name']}"}]})
    with opened(store) as con:
        assert neuron(con).model["run"] == "old"
        assert neuron(con, "renamed mlp-0/layers.0/2").model["run"] == "young"
        # the same weights
        assert neuron(con, data="images").model["run"] == "young"


def test_many_models_of_a_name_are_counted(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(6):
        monkeypatch.setattr("tests.handmade.model_id", lambda name, number=number: model_id(f"{number} {name}"))
        write_run(store, f"run{number}")
    with opened(store) as con:
        (said,) = [one for one in lines(page(find(con, "mlp-0"), width=200, colour=False), width=200) if "other" in one]
    ids = [f"{model_id(f'{number} mlp-0')[:8]} on digits (run run{number})" for number in (4, 3, 2)]
    assert said == f"other models of this name: {', '.join(ids)}, … 2 more"


def test_a_failure_on_one_data_set_hides_no_other(store: Store) -> None:
    write_run(store, "old")
    others = ("cnn-0", "cnn-0-init")
    write_run(store, "young", others, data="images", failed={"mlp-0": "it takes 8 inputs", "rnn-0": "no file"})
    with opened(store) as con:
        assert neuron(con).numbers["data"] == "digits"
        assert neuron(con, data="digits").numbers["run"] == "old"
        with pytest.raises(QueryError, match="model mlp-0 was not measured on data images, it failed: it takes 8 inpu"):
            find(con, "mlp-0/layers.0/2", data="images")
        with pytest.raises(QueryError, match=r"model mlp-0 was not measured on data 'x': known: digits$"):
            find(con, "mlp-0/layers.0/2", data="x")
        for data in (None, "digits"):
            with pytest.raises(QueryError, match="model rnn-0 was not measured, it failed: no file"):
                find(con, "rnn-0/layers.0/2", data=data)


def test_a_failed_model_of_the_name_is_named(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(store, "old")
    monkeypatch.setattr("tests.handmade.model_id", lambda name: model_id(f"another {name}"))
    write_run(store, "young", ("cnn-0", "cnn-0-init"), failed={"mlp-0": "its loss is not finite"})
    with opened(store) as con:
        shown = lines(page(neuron(con), width=100, colour=False), width=100)
    failed = f"{model_id('another mlp-0')[:8]} on digits (run young, failed)"
    assert f"another model of this name: {failed}" in shown


@pytest.mark.parametrize(
    ("splits", "first"),
    [(("train", "val"), "val"), (("dev", "test", "train"), "test"), (("train",), "train"), (("a", "b"), "a")],
)
def test_a_split_that_was_not_trained_on_is_shown_first(store: Store, splits: tuple[str, ...], first: str) -> None:
    write_run(store, "run", splits=splits)
    with opened(store) as con:
        found = neuron(con)
        assert found.numbers["split"] == first
        assert sorted(found.also_measured_on) == [f"digits/{one}" for one in splits if one != first]
        assert listing(con, "mlp-0/head").title == f"mlp-0/head on digits/{first}: its units"
        assert neuron(con, split=splits[-1]).numbers["split"] == splits[-1]
