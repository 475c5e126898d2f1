"""Every value lies in the range that the dictionary states; null and NaN are only where it says that they can be."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from pipeline.columns import Column
from pipeline.registry import statistics
from pipeline.sites import Presentations, Site
from pipeline.statistics.base import Statistic
from tests.laws.drawn import Recipe, draw, make_presentations, make_site
from tests.laws.laws import controls_of, is_key, observed, plain
from tests.laws.test_laws import NAMED, recipes

Row = Mapping[str, Any]


def bound_of(text: str, site: Site, classes: int, row: Row) -> float:
    """A number, or the name of one: another column of the row, or something of the site."""
    names = {"½": 0.5, "C": classes, "fan_in": site.fan_in, "units": site.units}
    text = text.strip().replace("−", "-")
    return float(names.get(text, row.get(text, text)))


def is_within(value: Any, stated: str, bound: Callable[[str], float]) -> bool:
    """Whether a value is in a range in the dictionary's notation."""
    if stated == "any":
        return True
    if stated[0] in "≥>":
        least = bound(stated[1:])
        return value >= least if stated[0] == "≥" else value > least
    if stated[0] == "[":
        low, high = map(bound, stated[1:-1].split(","))
        return low <= value <= high if stated[-1] == "]" else low <= value < high
    return str(value).lower() in stated.split(", ")


def test_ranges_are_read_as_they_are_written() -> None:
    cases = {
        ("≥ −2", -2): True, ("≥ −2", -2.5): False, ("> 0", 0): False, ("[0, ½]", 0.5): True, ("[0, C)", 3): False,
        ("[0, n]", 4): False, ("[low, n]", 0.5): False, ("true, false", True): True, ("a, b", "c"): False,
    }  # fmt: skip
    site, row = draw(Recipe(0)).site, {"n": 3, "low": 1.0}
    for (stated, value), inside in cases.items():
        assert is_within(value, stated, lambda text: bound_of(text, site, 3, row)) is inside


def check(column: Column, row: Row, site: Site, classes: int) -> None:
    name, value = f"{column.table}.{column.name}", row[column.name]
    if value is None:
        assert column.null.startswith("null"), f"{name} is null: {column.null}"
        return
    if isinstance(value, np.ndarray):
        assert "NaN" in column.null or not np.isnan(value).any(), f"{name} has NaN: {column.null}"
        return
    if isinstance(value, float) and math.isnan(value):
        assert "NaN" in column.null, f"{name} is NaN: {column.null}"
        return
    within = is_within(value, column.range, lambda text: bound_of(text, site, classes, row))
    assert within, f"{name} = {value!r} is not in {column.range}: {row}"


def check_all(statistic: Statistic, shown: Presentations) -> None:
    """The columns of one pass and of parts that were merged."""
    site, classes = shown.site, shown.classes
    halves = [shown.select_rows(shown.uid_N % 2 == half) for half in (0, 1)]
    declared = {(column.table, column.name): column for column in statistic.COLUMNS}
    for pieces in ([shown], halves):
        for table, columns in statistic.columns(site, observed(statistic, pieces, site), controls_of(site)).items():
            lists = {name: plain(values) for name, values in columns.items()}
            for values in zip(*lists.values(), strict=True):
                row = dict(zip(lists, values, strict=True))
                for name in row:
                    if not is_key(table, name):
                        check(declared[table, name], row, site, classes)
            if table == "neurons":
                # a column that is not given at all is null
                for column in statistic.COLUMNS:
                    if column.table == table and column.name not in columns:
                        assert column.null.startswith("null"), f"{column.name} is not given: {column.null}"


@pytest.mark.parametrize("name", sorted(statistics()))
def test_named_inputs(name: str) -> None:
    for kind, recipe in NAMED.items():
        shown = draw(recipe)
        if statistics()[name].applies(shown.site):
            try:
                check_all(statistics()[name], shown)
            except AssertionError as error:
                raise AssertionError(f"{kind}: {error}") from error


@pytest.mark.parametrize("name", sorted(statistics()))
@settings(max_examples=40, deadline=None, derandomize=True)
@given(recipe=recipes)
def test_drawn_inputs(name: str, recipe: Recipe) -> None:
    shown = draw(recipe)
    if statistics()[name].applies(shown.site):
        check_all(statistics()[name], shown)


def at_the_limits(seed: int, *, gate: str) -> Presentations:
    """Two inputs, opposite or with all entries equal but for their sign, at patterns along them: extremes of all."""
    random = np.random.default_rng(seed)
    fan_in, rows = int(random.integers(3, 9)), 2 * int(random.integers(1, 40))
    w_D = random.normal() * random.choice([-1, 1], fan_in)
    site = make_site(np.outer(random.normal(size=4), w_D), np.zeros(4), gate=gate)
    x_ND = np.outer(np.tile([1, -1], rows // 2) * random.normal(), w_D)
    return make_presentations(site, x_ND, dtype=torch.float32, classes=2,
                              label_N=torch.arange(rows) % 2)  # fmt: skip


@pytest.mark.parametrize("name", sorted(statistics()))
@pytest.mark.parametrize("gate", ["relu", "identity", "sigmoid"])
def test_extremes_lie_in_the_ranges_too(name: str, gate: str) -> None:
    for seed in range(40):
        shown = at_the_limits(seed, gate=gate)
        if statistics()[name].applies(shown.site):
            check_all(statistics()[name], shown)
