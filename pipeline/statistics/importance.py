"""importance: by how much the loss rises, to first order, when a unit is silenced or held at its mean.

Layer 2: pure torch, no I/O. It needs gradients: a batch is presented to it by `flow/gradients.py`. The effect of
replacing a by ā in a row is Σ over positions of (ā − a)·g with g = ∂loss/∂a, so the mean over rows is one centred
co-moment (Molchanov et al. 2017, "Pruning convolutional neural networks", eq. 7, with its sign kept; attribution
patching: Syed et al. 2023). Where the loss is convex in a, as in the last hidden layer, the real rise is never less.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from pipeline.columns import Column
from pipeline.kernels.base import Primitive, State
from pipeline.kernels.gradientsums import GradientSums
from pipeline.kernels.whole import Array, Whole
from pipeline.sites import Presentations, Site
from pipeline.statistics.base import Controls, Rows, Statistic, Values, part

_NULL = "null where there is no loss (labels, logits) or no gradient (pooled before its gate); NaN where never finite"
_SOURCE = "Molchanov et al. 2017, arXiv:1611.06440, eq. 7; Syed et al. 2023, arXiv:2310.10348"


@dataclass(frozen=True)
class Importance(Statistic):
    """First-order effect of ablating each unit on the loss."""

    sample_rows: int | None = 20_000

    name: ClassVar[str] = "importance"
    version: ClassVar[int] = 2
    needs_gradients: ClassVar[bool] = True
    COLUMNS: ClassVar[tuple[Column, ...]] = (
        Column(
            "importance_rows",
            "int64",
            "Rows with a loss that the importance columns rest on (of the sample).",
            unit="rows",
            range="≥ 0",
            formula="#(rows with 0 ≤ label < C)",
        ),
        Column(
            "importance_mean_ablation",
            "float64",
            "Rise of the mean loss of a row, to first order, if the unit always gave its mean; positive: it helps.",
            unit="nat",
            null=_NULL,
            formula="mean over rows of Σ over S positions of (ā − a)·g, g = ∂loss/∂a; = −S·Cov(a, g)",
            source=_SOURCE,
            se=True,
        ),
        Column(
            "importance_zero_ablation",
            "float64",
            "Rise of the mean loss of a row, to first order, if the unit always gave 0; positive: it helps.",
            unit="nat",
            null=_NULL,
            formula="mean over rows of Σ over positions of −a·g; = −S·E[a·g]",
            source=_SOURCE,
            se=True,
        ),
    )

    def primitives(self, site: Site) -> Mapping[str, Primitive]:
        """Co-moments of a and g."""
        return {"gradients": GradientSums()}

    def rows_together(self, site: Site) -> int:
        """Each unit alone."""
        return 1

    def columns(self, site: Site, state: State, controls: Controls) -> Rows:
        """Both effects, from one co-moment and two means."""
        sums = part(state, "gradients")
        neurons: dict[str, Values] = {"importance_rows": sums["rows_1"].expand(site.units).clone()}
        rows = int(sums["rows_1"])
        if rows:
            seen_U = sums["n_U"] > 0
            about_zero_U = sums["co_U"] + sums["n_U"] * sums["a_mean_U"] * sums["g_mean_U"]
            neurons["importance_mean_ablation"] = torch.where(seen_U, -sums["co_U"] / rows, torch.nan)
            neurons["importance_zero_ablation"] = torch.where(seen_U, -about_zero_U / rows, torch.nan)
        return {"neurons": neurons}

    def define(self, site: Site, whole: Presentations, controls: Controls) -> Rows:
        """The mean over rows of (ā − a)·g and of −a·g, added up over the positions of each."""
        rows = 0 if whole.gradient_LSU is None else whole.rows
        neurons: dict[str, Values] = {"importance_rows": torch.full((site.units,), rows)}
        if rows and whole.gradient_LSU is not None:
            seen = Whole(whole)
            g_PU = whole.gradient_LSU.double().reshape(-1, site.units).numpy()[seen.kept]
            keep_PU = seen.valid_PU & np.isfinite(g_PU)
            effects = [_defined(seen.a_PU[keep, u], g_PU[keep, u], rows) for u, keep in enumerate(keep_PU.T)]
            neurons["importance_mean_ablation"] = torch.tensor([effect[0] for effect in effects], dtype=torch.float64)
            neurons["importance_zero_ablation"] = torch.tensor([effect[1] for effect in effects], dtype=torch.float64)
        return {"neurons": neurons}


def _defined(a_P: Array, g_P: Array, rows: int) -> tuple[float, float]:
    if not len(a_P):
        return np.nan, np.nan
    return float(((a_P.mean() - a_P) * g_P).sum() / rows), float((-a_P * g_P).sum() / rows)


STATISTIC = Importance()
