"""The jackknife's standard error against theory and against leaving chunks out by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from pipeline.errors import ContractError
from pipeline.jackknife import BLOCKS, Block, block_of, standard_errors
from pipeline.kernels.base import State
from pipeline.registry import statistics
from pipeline.sites import Site
from pipeline.statistics.base import Controls, Values
from tests.laws.drawn import Recipe, draw, make_presentations, make_site
from tests.laws.laws import law_estimates

RESPONSE = statistics()["response"]


def errors_of(x_ND: np.ndarray, sizes: list[int]) -> dict[str, torch.Tensor]:
    """The errors of a site whose units' z are the columns of x, its rows cut into blocks of these sizes."""
    site = make_site(np.eye(x_ND.shape[1]))
    states = [
        RESPONSE.observe(make_presentations(site, part, dtype=torch.float64))
        for part in np.split(x_ND, np.cumsum(sizes)[:-1])
    ]
    whole = RESPONSE.empty(site)
    for state in states:
        whole = RESPONSE.merge(site, whole, state)
    blocks = [Block(state, size) for state, size in zip(states, sizes, strict=True)]
    return standard_errors(RESPONSE, site, blocks, whole, Controls())


def test_the_error_of_a_mean_of_independent_rows_is_the_textbook_one() -> None:
    x = np.random.default_rng(0).normal(3, 2, (4000, 64))
    found = errors_of(x, [400] * 10)["z_mean_se"].numpy()
    # a jackknife of 10 blocks is itself uncertain by 1/√18 = 24 %; averaged over 64 units by 3 %
    assert np.sqrt((found**2).mean()) == pytest.approx(2 / np.sqrt(4000), rel=0.1)


def test_unequal_blocks_give_the_formula_by_hand() -> None:
    rng = np.random.default_rng(1)
    sizes = [50, 10, 25, 90]
    x = rng.normal(size=(sum(sizes), 5))
    parts = np.split(x, np.cumsum(sizes)[:-1])
    whole = x.std(0)
    h = sum(sizes) / np.array(sizes)[:, None]
    deleted = np.stack([np.concatenate([*parts[:k], *parts[k + 1 :]]).std(0) for k in range(4)])
    pseudo = h * whole - (h - 1) * deleted
    expected = np.sqrt(((pseudo - (pseudo / h).sum(0)) ** 2 / (h - 1)).mean(0))
    np.testing.assert_allclose(errors_of(x, sizes)["z_std_se"].numpy(), expected, rtol=1e-9)


def test_correlated_rows_in_a_chunk_widen_the_error() -> None:
    rng = np.random.default_rng(2)
    repeated = np.repeat(rng.normal(size=(100, 32)), 40, axis=0)
    shuffled = repeated[rng.permutation(len(repeated))]
    together = errors_of(repeated, [400] * 10)["z_mean_se"].mean()
    apart = errors_of(shuffled, [400] * 10)["z_mean_se"].mean()
    assert together > 3 * apart


def test_one_chunk_has_no_error_and_empty_ones_do_not_count() -> None:
    x = np.random.default_rng(3).normal(size=(30, 2))
    assert errors_of(x, [30]) == {}
    assert errors_of(x, [30, 0]) == {}
    assert set(errors_of(x, [10, 0, 20])) >= {"z_mean_se", "fire_rate_se"}


@pytest.mark.parametrize("chunks", [1, 2, 9, 10, 11, 1000])
def test_blocks_are_runs_of_equal_length(chunks: int) -> None:
    numbers = [block_of(index, chunks) for index in range(chunks)]
    assert numbers == sorted(numbers)
    assert set(numbers) == set(range(min(BLOCKS, chunks)))
    counts = np.bincount(numbers)
    assert counts.max() - counts.min() <= 1


@dataclass(frozen=True)
class Longer(type(RESPONSE)):  # type: ignore[misc]
    """Response, whose means are estimated of so many units more, or as zeros."""

    more: int = 0

    def estimates(self, site: Site, state: State, controls: Controls) -> Mapping[str, Values]:
        given = super().estimates(site, state, controls)
        return {**given, "z_mean": torch.zeros(site.units + self.more, dtype=torch.float64)}


def test_what_is_not_one_value_of_each_unit_is_no_estimate() -> None:
    site, random = make_site(np.eye(3)), np.random.default_rng(0)
    states = [RESPONSE.observe(make_presentations(site, random.normal(size=(9, 3)))) for _ in range(2)]
    whole, blocks = RESPONSE.merge(site, *states), [Block(state, 9) for state in states]
    said = r"^statistic response at site site: estimates\(\) gives z_mean of shape \(4,\); expected \(3,\), one value"
    with pytest.raises(ContractError, match=said):
        standard_errors(Longer(more=1), site, blocks, whole, Controls())


def test_the_laws_refuse_estimates_that_are_not_what_the_column_has() -> None:
    # their standard errors would be 0 exactly
    with pytest.raises(AssertionError, match="z_mean: "):
        law_estimates(Longer(), draw(Recipe(0)), np.random.default_rng(0))
