"""Co-moments of a unit's activation with the gradient of the loss at it.

Layer 1: pure torch, no I/O. All in float64: one number per unit and presentation, no products of matrices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipeline.kernels.base import Primitive, State
from pipeline.kernels.comoment import all_finite, observe_slices
from pipeline.sites import Presentations, Site


@dataclass(frozen=True)
class GradientSums(Primitive):
    """Of a and g = ∂(sum of row losses)/∂a over the unmasked presentations where z, a and g are finite.

    rows_1    int64, rows whose gradients were seen
    n_U       int64, presentations
    a_mean_U, g_mean_U, co_U   means, and Σ(a − ā)(g − ḡ)

    The state stays empty where there are no gradients.
    """

    def empty(self, site: Site) -> State:
        """Nothing seen."""
        floats = {name: torch.zeros(site.units, dtype=torch.float64) for name in ("a_mean_U", "g_mean_U", "co_U")}
        counts = {"rows_1": torch.zeros(1, dtype=torch.int64), "n_U": torch.zeros(site.units, dtype=torch.int64)}
        return counts | floats

    def observe(self, presentations: Presentations) -> State:
        """Merge the sums of the batch's slices."""
        state = observe_slices(self, presentations, self._slice, width=presentations.site.units)
        rows = 0 if presentations.gradient_LSU is None else presentations.rows
        return state | {"rows_1": torch.full_like(state["rows_1"], rows)}

    def merge(self, left: State, right: State) -> State:
        """Chan's update of means and a co-moment, per unit."""
        n_U = left["n_U"] + right["n_U"]
        share_U = right["n_U"].double() / n_U.clamp(min=1)
        a_step_U, g_step_U = (right[name] - left[name] for name in ("a_mean_U", "g_mean_U"))
        return {
            "rows_1": left["rows_1"] + right["rows_1"],
            "n_U": n_U,
            "a_mean_U": left["a_mean_U"] + a_step_U * share_U,
            "g_mean_U": left["g_mean_U"] + g_step_U * share_U,
            "co_U": left["co_U"] + right["co_U"] + left["n_U"] * share_U * a_step_U * g_step_U,
        }

    def _slice(self, presentations: Presentations, start: int, stop: int) -> State:
        device = presentations.z_LSU.device
        if presentations.gradient_LSU is None:
            return {name: value.to(device) for name, value in self.empty(presentations.site).items()}
        z_PU, a_PU, g_PU = (
            value[start:stop].flatten(0, 1)
            for value in (presentations.z_LSU, presentations.a_LSU, presentations.gradient_LSU)
        )
        dropped_PU = None
        if not (all_finite(z_PU) and all_finite(a_PU) and all_finite(g_PU)):
            dropped_PU = ~(z_PU.isfinite() & a_PU.isfinite() & g_PU.isfinite())
        if presentations.mask_LS is not None:
            masked_P1 = ~presentations.mask_LS[start:stop].reshape(-1, 1)
            dropped_PU = masked_P1.expand_as(z_PU) if dropped_PU is None else dropped_PU | masked_P1
        n_U = torch.full_like(z_PU[0], len(z_PU), dtype=torch.int64) if dropped_PU is None else (~dropped_PU).sum(0)
        a_mean_U, a_PU = _centred(a_PU.to(torch.float64, copy=True), dropped_PU, n_U)
        g_mean_U, g_PU = _centred(g_PU.to(torch.float64, copy=True), dropped_PU, n_U)
        return {
            "rows_1": torch.zeros(1, dtype=torch.int64, device=device),
            "n_U": n_U,
            "a_mean_U": a_mean_U,
            "g_mean_U": g_mean_U,
            "co_U": a_PU.mul_(g_PU).sum(0),
        }


def _centred(
    value_PU: torch.Tensor, dropped_PU: torch.Tensor | None, n_U: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of what is not dropped, and deviations from them: 0 where dropped. Takes its argument's memory."""
    if dropped_PU is not None:
        value_PU.masked_fill_(dropped_PU, 0)
    mean_U = value_PU.sum(0) / n_U.clamp(min=1)
    value_PU -= mean_U
    if dropped_PU is not None:
        value_PU.masked_fill_(dropped_PU, 0)
    return mean_U, value_PU
