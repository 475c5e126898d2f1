"""Moments against SciPy and exact sums, at any mean and in any split."""

from __future__ import annotations

import math
from functools import reduce

import numpy as np
import pytest
import scipy.stats
import torch

from pipeline.kernels.moments import Moments
from tests.laws.drawn import make_presentations, make_site, split

MOMENTS = Moments("z", 4)


def observed(z_PU: np.ndarray, pieces: int = 1, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    site = make_site(np.ones((z_PU.shape[1], 1)))
    shown = make_presentations(site, np.zeros((len(z_PU), 1)), z_LSU=torch.as_tensor(z_PU)[:, None], dtype=dtype)
    parts = split(shown, torch.arange(len(z_PU)) * pieces // max(1, len(z_PU)))
    return reduce(MOMENTS.merge, (MOMENTS.observe(part) for part in parts), MOMENTS.empty(site))


@pytest.mark.parametrize("pieces", [1, 7, 500])
@pytest.mark.parametrize("kappa", [0, 1, 300, 1e6])
def test_central_moments_keep_their_precision(kappa: float, pieces: int) -> None:
    z = np.random.default_rng(0).gamma(2.0, size=500) + kappa
    state = observed(z[:, None], pieces)
    mean = math.fsum(z) / len(z)
    spread = z.std()
    assert abs(float(state["mean"]) - mean) <= 1e-12 * np.abs(z).max()
    for power in (2, 3, 4):
        exact = math.fsum((value - mean) ** power for value in z)
        allowed = 1e-13 * (1 + abs(mean) / spread) * math.fsum(abs(value - mean) ** power for value in z)
        assert abs(float(state[f"m{power}"]) - exact) <= allowed, power


@pytest.mark.parametrize("pieces", [1, 3, 100])
def test_moments_are_those_of_scipy(pieces: int) -> None:
    z = np.random.default_rng(1).lognormal(size=(100, 2))
    state = observed(z, pieces)
    n = state["n"].double()
    np.testing.assert_allclose(state["m2"] / n, z.var(0), rtol=1e-12)
    np.testing.assert_allclose(n.sqrt() * state["m3"] / state["m2"] ** 1.5, scipy.stats.skew(z), rtol=1e-11)
    np.testing.assert_allclose(n * state["m4"] / state["m2"] ** 2 - 3, scipy.stats.kurtosis(z), rtol=1e-11)


def test_equal_numbers_have_no_spread() -> None:
    state = observed(np.full((1000, 1), 0.1), pieces=7)
    assert float(state["mean"]) == 0.1
    assert [float(state[name]) for name in ("m2", "m3", "m4")] == [0, 0, 0]


def test_largest_numbers_of_a_narrow_type_do_not_overflow() -> None:
    z = np.array([[65504.0], [-65504.0], [60000.0]])
    np.testing.assert_allclose(observed(z, dtype=torch.float16)["m2"] / 3, z.var(0), rtol=1e-12)


def test_extremes_of_nothing_are_infinite() -> None:
    empty = MOMENTS.empty(make_site(np.ones((2, 1))))
    assert empty["min"].tolist() == [math.inf] * 2
    assert empty["max"].tolist() == [-math.inf] * 2


@pytest.mark.parametrize("z", [[0.0, -0.0], [-0.0, 0.0], [-0.0, -0.0]])
def test_zeros_have_no_sign_whichever_comes_first(z: list[float]) -> None:
    for pieces in (1, 2):
        state = observed(np.array(z)[:, None], pieces)
        assert not any(bool(state[name].signbit()) for name in ("min", "max", "mean"))


def test_another_order_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Moments\('z', 3\): expected order 2 or 4"):
        Moments("z", 3)  # type: ignore[arg-type]
