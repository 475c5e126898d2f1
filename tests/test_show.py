"""One neuron on a page: found by what a person types, drawn right, fitting the terminal."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from pipeline.query import Connection, QueryError, connect
from pipeline.report.neuron import page
from pipeline.report.pattern import pattern_picture
from pipeline.report.picture import picture
from pipeline.report.printing import fitted
from pipeline.show import TABLES, Listing, Neuron, find
from pipeline.store import open_store
from tests.handmade import model_id, write_run


@pytest.fixture(scope="module")
def con(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Connection]:
    store = open_store(str(tmp_path_factory.mktemp("store")))
    write_run(store, "run", ("mlp-0", "mlp-0-init", "cnn/small-0", "cnn/small-0-init"))
    with closing(connect(store, tables=TABLES)) as con:
        yield con


def neuron(con: Connection, address: str = "mlp-0/layers.0/2") -> Neuron:
    found = find(con, address)
    assert isinstance(found, Neuron)
    return found


def lines(renderable: object, *, width: int = 80, colour: bool = False) -> list[str]:
    sink = io.StringIO()
    Console(file=sink, width=width, force_terminal=colour, color_system="truecolor" if colour else None).print(
        renderable
    )
    return sink.getvalue().splitlines()


@pytest.mark.parametrize(
    "address",
    [
        "mlp-0/layers.0/2",
        "/mlp-0/layers.0/2/",
        f"{model_id('mlp-0')}/layers.0/2",
        f"{model_id('mlp-0')[:8]}/layers.0/2",
    ],
)
def test_a_model_is_named_by_its_name_or_the_beginning_of_its_id(con: Connection, address: str) -> None:
    found = neuron(con, address)
    assert (found.model["name"], found.site["site"], found.numbers["unit"]) == ("mlp-0", "layers.0", 2)
    assert found.pattern is not None
    assert found.pattern["weight"] == pytest.approx(np.linspace(-3, 3, 16))
    assert found.twin is not None
    assert (found.numbers["template_cos"], found.twin["template_cos"]) == (0.75, 0.25)
    assert [(row["kind"], row["rank"]) for row in found.exemplars] == [
        ("greatest", 0), ("greatest", 1), ("random", 0), ("random", 1),
    ]  # fmt: skip
    assert [row["fired"] for row in found.classes] == [0, 10, 20]


def test_names_may_contain_slashes(con: Connection) -> None:
    assert neuron(con, "cnn/small-0/head/1").model["name"] == "cnn/small-0"


def test_an_untrained_twin_has_no_twin(con: Connection) -> None:
    assert neuron(con, "mlp-0-init/head/0").twin is None


def test_an_address_that_ends_early_lists_what_comes_next(con: Connection) -> None:
    sites = find(con, "mlp-0")
    assert isinstance(sites, Listing)
    assert [row[0] for row in sites.rows] == ["layers.0", "head"]
    units = find(con, "mlp-0/layers.0")
    assert isinstance(units, Listing)
    assert [row[0] for row in units.rows] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("mpl-0/layers.0/2", r"there is no model 'mpl-0': did you mean 'mlp-0'\?"),
        ("mlp-0/layer.0/2", r"model mlp-0 has no site 'layer.0': did you mean 'layers.0'\?"),
        ("mlp-0/layer.0", r"model mlp-0 has no site 'layer.0': did you mean 'layers.0'\?"),
        ("mlp-0/layers.0/4", "site layers.0 has no unit '4': expected 0 to 3"),
        ("mlp-0/layers.0/-1", "site layers.0 has no unit '-1': expected 0 to 3"),
        ("mlp-0/layers.0/x", "site layers.0 has no unit 'x': expected 0 to 3"),
        ("", "there is no model ''"),
    ],
)
def test_what_is_unknown_is_named_with_the_nearest(con: Connection, address: str, message: str) -> None:
    with pytest.raises(QueryError, match=message):
        find(con, address)


def test_an_ambiguous_model_is_refused(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    names = [f"m-{number}" for number in range(20)]
    write_run(store, "run", names, tables=("models", "sites"))
    shared = next(letter for letter in "0123456789abcdef" if sum(model_id(n).startswith(letter) for n in names) > 1)
    with (
        closing(connect(store, tables=("models", "sites"))) as con,
        pytest.raises(QueryError, match=rf"the ids of \d+ models begin with '{shared}': "),
    ):
        find(con, shared)


def test_of_models_of_one_name_the_latest_runs_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(tmp_path))
    write_run(store, "old", ("mlp-0",))
    monkeypatch.setattr("tests.handmade.model_id", lambda name: f"other {name}")
    write_run(store, "new", ("mlp-0",))
    with closing(connect(store, tables=TABLES)) as con:
        assert neuron(con).model["run"] == "new"


def test_data_and_split_are_chosen(con: Connection) -> None:
    assert isinstance(find(con, "mlp-0/head/0", data="digits", split="test"), Neuron)
    with pytest.raises(QueryError, match="not measured on data any, split train: known: digits/test"):
        find(con, "mlp-0/head/0", split="train")


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("address", ["mlp-0/layers.0/2", "mlp-0/layers.0/1", "mlp-0/head/1", "mlp-0", "mlp-0/layers.0"])
def test_a_page_fits_the_terminal(con: Connection, address: str, width: int) -> None:
    shown = lines(page(find(con, address), width=width, colour=False), width=width)
    assert max(map(len, shown)) <= width
    assert not any("…" in line for line in shown)


def test_a_page_says_it_with_its_controls(con: Connection) -> None:
    text = "\n".join(lines(page(neuron(con), width=80, colour=False)))
    assert "mlp-0 / layers.0 / 2" in text
    assert "cos(Cov(a,x), w) 0.75 0.25 0.0625 other units" in " ".join(text.split())
    assert "E[x|fires]" in text
    assert not {"▀", "\x1b"} & set(text)
    dead = "\n".join(lines(page(neuron(con, "mlp-0/layers.0/1"), width=80, colour=False)))
    assert "dead: it fired for none of these rows" in dead


def test_a_page_has_the_numbers_of_every_statistic(con: Connection) -> None:
    found = neuron(con)
    asked_otherwise = replace(found, numbers={**found.numbers, "redundancy_r": 0.625, "redundancy_r_se": 0.03125})
    text = lines(page(asked_otherwise, width=100, colour=False))
    at = text.index(next(line for line in text if line.strip() == "redundancy"))
    assert text[at + 1].split() == ["redundancy_r", "0.625", "0.031", "–"]


def test_classes_have_their_labels(con: Connection) -> None:
    found = neuron(con)
    for labels, wanted in (((), "2"), (("north", "south", "west"), "2 (west)")):
        text = lines(page(replace(found, labels=labels), width=100, colour=False))
        at = text.index("classes it fires for")
        assert text[at + 3].lstrip().startswith(f"{wanted} ")


def test_a_page_without_numbers_has_no_table_of_them(con: Connection) -> None:
    found = neuron(con)
    keys = {key: found.numbers[key] for key in ("run", "model", "data", "split", "site", "unit")}
    assert not any("this unit" in line for line in lines(page(replace(found, numbers=keys), width=80, colour=False)))


def test_colour_pictures_are_half_blocks(con: Connection) -> None:
    text = "\n".join(lines(page(neuron(con), width=80, colour=True), colour=True))
    assert "▀" in text
    # the first weight of the pattern is its most negative one, the last its most positive
    assert "\x1b[38;2;33;102;172" in text
    assert "48;2;178;24;43m" in text


def test_a_picture_shows_sign_size_and_nan() -> None:
    drawn = picture(np.array([[-1.0, 0.0], [np.nan, 0.5]]), colour=False, width=10)
    assert [line.plain for line in drawn] == ["|OO  |", "|??++|"] or [line.plain for line in drawn] == [
        "|OO  |",
        "|??**|",
    ]


def test_a_large_picture_is_averaged_and_fits() -> None:
    values = np.zeros((100, 100))
    values[:50] = 1.0
    for colour in (False, True):
        drawn = picture(values, colour=colour, width=20)
        assert max(len(line.plain) for line in drawn) <= 20
    plain = [line.plain for line in picture(values, colour=False, width=20)]
    assert plain[0].strip("|") == "@" * len(plain[0].strip("|"))
    assert plain[-1].strip("|").strip() == ""


def test_pictures_of_channels_and_bars_of_features() -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(16, 3, 3))
    weight[5] *= 100
    site = {"input_kind": "pixels", "input_shape": [16, 3, 3]}
    drawn = lines(pattern_picture(site, {"weight": weight.ravel().tolist()}, width=80, colour=False))
    assert " 5 " in drawn[0]
    assert "8 of 16 channels" in "\n".join(drawn)
    features = {"input_kind": "features", "input_shape": [30]}
    terms = lines(pattern_picture(features, {"weight": [0.0] * 29 + [-2.0]}, width=80, colour=False))
    assert terms[2].startswith("feature 29")
    assert "====|" in terms[2]
    assert "100 % of ‖w‖²" in terms[-1]


def test_a_result_too_wide_is_cut_turned_or_told() -> None:
    many = [f"column_{number}" for number in range(40)]
    for rows in (1, 5):
        shown = lines(fitted(many, [[0.5] * 40] * rows, width=80))
        assert max(map(len, shown)) <= 80
        assert all(any(name in line for line in shown) for name in many) or "than fit" in "\n".join(shown)
    hexes = lines(fitted(["run", "value"], [["f" * 100, 1]] * 5, width=80))
    assert max(map(len, hexes)) <= 80
    assert "…" in hexes[2]
