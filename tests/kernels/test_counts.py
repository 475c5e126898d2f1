"""Counts of 32 bits: never wrong beyond them, in any order; stored, read and turned into columns all the same."""

from __future__ import annotations

import itertools
from functools import partial, reduce

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cells import CellState, Rows, decode_cell, encode_cell, misfit
from pipeline.kernels import choose
from pipeline.kernels.accumulate import Accumulator, Bounded
from pipeline.kernels.base import State
from pipeline.kernels.counts import LARGEST, added, narrowed
from pipeline.registry import statistics
from pipeline.statistics.base import Controls, Statistic
from tests.kernels.fused import assert_same, primitives_of
from tests.laws.drawn import Recipe, draw, split

LARGE = 2**30 + 12345
NAMES = ("response", "match", "redundancy")


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, LARGEST + 5), min_size=2, max_size=5))
def test_sums_are_those_of_whole_numbers_in_any_order(counts: list[int]) -> None:
    every = [narrowed(torch.tensor([count, 1])) for count in counts]
    for order in itertools.islice(itertools.permutations(every), 8):
        found = reduce(added, order)
        assert found.tolist() == [sum(counts), len(counts)]
        assert found.dtype == (torch.int32 if sum(counts) <= LARGEST else torch.int64)


def scaled(state: State, times: int) -> State:
    """The state of so many times the presentations: counts alone, which no mean depends on."""
    return {
        name: narrowed(value.long() * times) if value.dtype == torch.int32 else value * times
        if value.dtype == torch.int64 and not name.endswith("top") else value
        for name, value in state.items()
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_states_beyond_32_bits_are_merged_stored_and_read_exactly(name: str) -> None:
    statistic = statistics()[name]
    shown = draw(Recipe(4, rows=40, units=5, positions=2))
    once = statistic.observe(shown)
    narrow = {key for key, value in once.items() if value.dtype == torch.int32}
    assert narrow
    large = scaled(once, LARGE)
    both = statistic.merge(shown.site, large, large)
    assert {key for key, value in both.items() if value.dtype == torch.int64} >= narrow
    for key in narrow:
        assert torch.equal(both[key], 2 * LARGE * once[key].long()), key
    back = decode_cell(encode_cell(CellState({"a": both}, Rows(1, 1), {}, "cpu", "0" * 64))).states["a"]
    assert all(torch.equal(back[key], value) and back[key].dtype == value.dtype for key, value in both.items())
    assert misfit(back, statistic.empty(shown.site)) is None
    assert misfit(once, both) is not None


@pytest.mark.parametrize("name", sorted(statistics()))
def test_a_state_of_values_that_are_not_finite_is_one_of_its_site(name: str) -> None:
    statistic = statistics()[name]
    shown = draw(Recipe(5, rows=40, units=5, groups=2, bad=(float("nan"), float("inf"))))
    if not statistic.applies(shown.site):
        return
    assert not shown.z_LSU.isfinite().all()
    forms = statistic.forms(shown.site)
    assert misfit(statistic.observe(shown), *forms) is None
    merged = statistic.merge(shown.site, statistic.empty(shown.site), statistic.observe(shown))
    assert misfit(merged, *forms) is None


@pytest.mark.parametrize("name", ["response", "match"])
def test_shares_do_not_depend_on_how_many_bits_the_counts_have(name: str) -> None:
    statistic: Statistic = statistics()[name]
    shown = draw(Recipe(4, rows=40, units=5, positions=2))
    few, many = statistic.observe(shown), scaled(statistic.observe(shown), LARGE)
    rows = [statistic.columns(shown.site, state, Controls()) for state in (few, many)]
    for column in {"pearson_auroc", "pearson_half", "cosine_q50", "fire_rate", "z_q50"} & rows[0]["neurons"].keys():
        one, other = (of["neurons"][column] for of in rows)
        # a quantile's place within its bin depends on n
        torch.testing.assert_close(one, other, rtol=0.25, atol=1e-3, equal_nan=True)
    for one, other in zip(rows[0]["histograms"]["count"], rows[1]["histograms"]["count"], strict=True):
        assert int(other) == LARGE * int(one)


def test_what_is_begun_anew_before_counts_outgrow_their_bits_changes_none() -> None:
    shown = draw(Recipe(5, rows=60, units=9, positions=3))
    pieces = split(shown, torch.arange(60) // 7)
    needed = primitives_of(shown.site)
    grown = partial(choose.accumulator, choose.name(), shown.site, needed)
    begun = []

    def counting() -> Accumulator:
        begun.append(len(begun))
        return grown()

    whole, bounded = grown(), Bounded(counting, most=50)
    for piece in pieces:
        whole.add(piece)
        bounded.add(piece)
    # 21 presentations a piece: two fit
    assert len(begun) == len(pieces) // 2 + len(pieces) % 2
    for primitive, state in whole.states().items():
        assert_same(bounded.states()[primitive], state, primitive)
