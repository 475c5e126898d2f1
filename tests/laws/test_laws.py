"""Every registered statistic keeps every law, on inputs drawn to break it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from pipeline.registry import statistics
from tests.laws.drawn import Recipe, draw
from tests.laws.laws import LAWS, controls_of, is_key

recipes = st.builds(
    Recipe,
    seed=st.integers(0, 2**32),
    rows=st.sampled_from([0, 1, 2, 7, 30]),
    positions=st.sampled_from([1, 1, 3]),
    units=st.sampled_from([1, 3]),
    fan_in=st.sampled_from([1, 2, 3, 6]),
    groups=st.sampled_from([1, 1, 2]),
    gate=st.sampled_from(["relu", "gelu", "sigmoid", "identity"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([1.0, 1.0, 1e-3, 100.0]),
    shift=st.sampled_from([0.0, 0.0, 300.0]),
    spread=st.booleans(),
    masked=st.booleans(),
    numbered=st.booleans(),
    labelled=st.booleans(),
    by_position=st.booleans(),
    normed=st.booleans(),
    repeated=st.booleans(),
    constant=st.booleans(),
    tied=st.booleans(),
    flat=st.booleans(),
    unbiased=st.booleans(),
    graded=st.booleans(),
    bad=st.sampled_from([(), (np.nan,), (np.nan, np.inf, -np.inf), (0.0, -0.0), (1e30, -1e-30)]),
)

# One of each kind of input, whatever hypothesis draws.
NAMED = {
    "empty": Recipe(0, rows=0),
    "one row": Recipe(1, rows=1),
    "plain": Recipe(2, rows=40),
    "constant": Recipe(3, rows=20, constant=True),
    "tied": Recipe(4, rows=20, tied=True),
    "repeated": Recipe(5, rows=20, repeated=True),
    "huge": Recipe(6, rows=20, scale=1e30),
    "tiny": Recipe(7, rows=20, scale=1e-30, bad=(1e-42, -1e-42)),
    "not finite": Recipe(8, rows=30, bad=(np.nan, np.inf, -np.inf)),
    "masked": Recipe(9, rows=12, positions=4, masked=True),
    "spread over entries": Recipe(10, rows=12, positions=2, spread=True),
    "grouped": Recipe(11, rows=20, groups=3),
    "normed": Recipe(12, rows=20, normed=True),
    "identity gate": Recipe(13, rows=20, gate="identity"),
    "signed gate": Recipe(14, rows=20, gate="gelu"),
    "gated pair, folded": Recipe(18, rows=20, gate="gelu", paired=True),
    "with gradients": Recipe(19, rows=20, positions=2, graded=True),
    "gradients not finite": Recipe(26, rows=20, masked=True, positions=2, graded=True, bad=(1.0,)),
    "unlabelled": Recipe(15, rows=10, labelled=False),
    "labels of positions": Recipe(28, rows=12, positions=3, by_position=True, masked=True, bad=(np.nan,)),
    "labels of positions, spread": Recipe(
        29, rows=12, positions=2, by_position=True, spread=True, masked=True, numbered=True
    ),
    "far from zero": Recipe(16, rows=30, shift=1e4, dtype=torch.float64),
    "two inputs": Recipe(20, rows=20, fan_in=2),
    "constant inputs": Recipe(21, rows=30, fan_in=7, flat=True, dtype=torch.float64),
    "zeros of both signs": Recipe(22, rows=30, unbiased=True, tied=True, bad=(0.0, -0.0)),
    "five units": Recipe(27, rows=20, units=5, masked=True),
    "forty units": Recipe(31, rows=20, units=40, masked=True),
    "every octave": Recipe(
        23, rows=200, bad=tuple(sign * 1.3 * 2.0**octave for sign in (1, -1) for octave in (-14, -8, -7, -6, 6, 7, 12))
    ),
    "a alone not finite": Recipe(30, rows=30, positions=2, gate="gelu", overflown=True),
    "normed, not finite": Recipe(24, rows=30, normed=True, bad=(np.nan,)),
    "upstream units in groups": Recipe(25, rows=20, groups=2, paired=True),
    "everything": Recipe(
        17, rows=25, positions=3, groups=2, spread=True, masked=True, numbered=True, tied=True, bad=(np.nan, 0.0)
    ),
}


# Parameters other than the defaults: what they change must keep the laws as well.
CHANGED: dict[str, dict[str, Any]] = {
    "composition, of few positions": {"positions": 2, "top": 2},
    "exemplars, few": {"k": 2, "per_octave": 1},
    "labels, unequal classes": {"prior": (1, 5, 2)},
    "redundancy, few compared": {"largest": 2},
    "template, of few positions": {"positions": 2, "whitened_fan_in": 3},
}
CHOSEN = statistics() | {
    name: replace(statistics()[name.split(",")[0]], **changed) for name, changed in CHANGED.items()
}


# with which others a unit is compared follows from its number where it is not with all
NOT_KEPT = {("redundancy, few compared", "unit_permutation")}
EVERY = [(name, law) for name in sorted(CHOSEN) for law in sorted(LAWS) if (name, law) not in NOT_KEPT]


@pytest.mark.parametrize(("name", "law"), EVERY)
def test_named_inputs(name: str, law: str) -> None:
    statistic = CHOSEN[name]
    for kind, recipe in NAMED.items():
        shown = draw(recipe)
        if statistic.applies(shown.site):
            try:
                LAWS[law](statistic, shown, np.random.default_rng(recipe.seed))
            except AssertionError as error:
                raise AssertionError(f"{kind}: {error}") from error


@pytest.mark.parametrize("law", sorted(LAWS))
@pytest.mark.parametrize("name", sorted(statistics()))
@settings(max_examples=25, deadline=None, derandomize=True)
@given(recipe=recipes)
def test_drawn_inputs(name: str, law: str, recipe: Recipe) -> None:
    statistic = statistics()[name]
    shown = draw(recipe)
    if statistic.applies(shown.site):
        LAWS[law](statistic, shown, np.random.default_rng(recipe.seed))


@pytest.mark.parametrize("name", sorted(statistics()))
def test_every_declared_column_is_given_somewhere(name: str) -> None:
    statistic = statistics()[name]
    given = set()
    for recipe in NAMED.values():
        shown = draw(replace(recipe, rows=max(recipe.rows, 20)))
        if statistic.applies(shown.site):
            rows = statistic.columns(shown.site, statistic.observe(shown), controls_of(shown.site))
            given |= {
                (table, column) for table, columns in rows.items() for column in columns if not is_key(table, column)
            }
    assert {(column.table, column.name) for column in statistic.COLUMNS} == given


@pytest.mark.parametrize("name", sorted(statistics()))
def test_every_column_says_what_it_is(name: str) -> None:
    """Meaning, unit, range, when it is null, and a formula; of numbers also the type that they are stored in."""
    for column in statistics()[name].COLUMNS:
        where = f"{column.table}.{column.name}"
        assert column.meaning.endswith("."), where
        assert column.unit, where
        assert column.null, where
        assert column.range, where
        words = column.dtype == "string" or column.name in ("kind", "rank", "quantity", "bin", "class", "meaning")
        assert column.formula or words, where
