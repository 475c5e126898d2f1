"""The jackknife's standard error against theory and against leaving chunks out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.jackknife import BLOCKS, Block, block_of, standard_errors
from pipeline.registry import statistics
from pipeline.statistics.base import Controls
from tests.laws.drawn import make_presentations, make_site

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
