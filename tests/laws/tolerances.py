"""How far a float column may be from its definition, or from itself in another merge order: absolute, per unit.

Columns not named here agree to `RELATIVE` of themselves. Integers, extremes, choices and strings always agree exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pipeline.kernels.whole import Whole
from pipeline.sites import Presentations

RELATIVE = 1e-9
# Chosen, never summed: equal to the last bit.
EXACT = frozenset({"z_min", "z_max", "a_min", "a_max", "z", "a", "low", "high"})
# Of columns by the start of their name, absolute: cosines of float32 products.
# Undoing correlations amplifies float32 rounding by up to fan-in / RIDGE: 6000 for the widest drawn.
PREFIXES = {"template_cos_whitened": 3e-3, "template_": 1e-5, "redundancy_": 1e-5}
# Of list columns, relative to their Euclidean norm: float32 products. Of mean_x, relative to the largest ‖x‖, u = 2⁻²⁴:
# the sum is of float64, so what rounds are the deviations that are summed, from a mean as long as x (2u), again where
# some units saw fewer presentations (2u), and the column itself, on either side (2u).
VECTOR_TOLERANCES = {"cov": 1e-5, "sta": 1e-5, "mean_x": 6 * 2.0**-24}


@dataclass(frozen=True, eq=False)
class Scales:
    """Per unit what the tolerances of central moments scale with: κ = |mean|/std and E|v − v̄|^p / std^p."""

    shown: Presentations

    @cached_property
    def z(self) -> Spread:
        return _spread(Whole(self.shown).z_PU, Whole(self.shown).valid_PU)

    @cached_property
    def x(self) -> float:
        """Largest length of an input: a mean of inputs may cancel to nothing."""
        with np.errstate(over="ignore"):
            norm_P = np.sqrt(np.square(Whole(self.shown).x_PGD).sum(-1))
        return float(norm_P[np.isfinite(norm_P)].max(initial=0.0))

    @property
    def product(self) -> np.ndarray:
        """Of each unit ‖w‖ · max ‖x‖."""
        return self.x * self.shown.site.pattern_UD.norm(dim=1).numpy()

    @cached_property
    def a(self) -> Spread:
        return _spread(Whole(self.shown).a_PU, Whole(self.shown).valid_PU)


@dataclass(frozen=True, eq=False)
class Spread:
    largest: np.ndarray
    std: np.ndarray
    kappa: np.ndarray
    third: np.ndarray
    fourth: np.ndarray


def _spread(value_PU: np.ndarray, valid_PU: np.ndarray) -> Spread:
    found = []
    for value, valid in zip(value_PU.T, valid_PU.T, strict=True):
        kept = value[valid]
        if not len(kept) or kept.min() == kept.max():
            found.append((np.abs(kept).max(initial=0.0), 0.0, 0.0, 0.0, 0.0))
            continue
        rest, std = np.abs(kept - kept.mean()), kept.std()
        third, fourth = (rest**3).mean() / std**3, (rest**4).mean() / std**4
        found.append((np.abs(kept).max(), std, abs(kept.mean()) / std, third, fourth))
    return Spread(*np.array(found).reshape(-1, 5).T)


# statistics.md §4: mean 1e-12·max|z|; M_p 1e-13·(1+κ)·Σ|z−z̄|^p, and what follows for quotients of M_p
TOLERANCES: dict[str, Callable[[Scales], np.ndarray]] = {
    "z_mean": lambda scales: 1e-12 * scales.z.largest,
    "a_mean": lambda scales: 1e-12 * scales.a.largest,
    "z_std": lambda scales: 1e-13 * (1 + scales.z.kappa) * scales.z.std,
    "a_std": lambda scales: 1e-13 * (1 + scales.a.kappa) * scales.a.std,
    "z_skewness": lambda scales: 1e-13 * (1 + scales.z.kappa) * 2.5 * scales.z.third,
    "a_skewness": lambda scales: 1e-13 * (1 + scales.a.kappa) * 2.5 * scales.a.third,
    # Σ_i |w_i| mean|x_i| bounds what rounding of the products adds up to, and Cauchy–Schwarz bounds that by ‖w‖·max‖x‖;
    # the contributions themselves may cancel
    "composition_total": lambda scales: 1e-5 * scales.product,
    "contribution": lambda scales: 1e-5 * scales.product,
    "z_kurtosis": lambda scales: 1e-13 * (1 + scales.z.kappa) * 3 * scales.z.fourth,
    "a_kurtosis": lambda scales: 1e-13 * (1 + scales.a.kappa) * 3 * scales.a.fourth,
}


def tolerance(column: str, value: np.ndarray, unit: np.ndarray, scales: Scales) -> np.ndarray:
    """The largest allowed difference at each value of a column; `unit` says whose it is."""
    if column in EXACT:
        return np.zeros_like(value)
    if column in TOLERANCES:
        return TOLERANCES[column](scales)[unit] if len(unit) else value
    if column == "share":
        # a large share is of a sum that nearly cancels
        return 1e-5 * (1 + np.square(np.nan_to_num(value)))
    for prefix, allowed in PREFIXES.items():
        if column.startswith(prefix):
            return np.full_like(value, allowed)
    return RELATIVE * np.maximum(np.abs(np.nan_to_num(value)), 1e-3)
