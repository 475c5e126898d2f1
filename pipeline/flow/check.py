"""Checks a pattern against the model: folded w·x + b of explicit patches is the model's own pre-activation.

Layer 1: pure torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pipeline.batch import Batch
from pipeline.errors import ModelError
from pipeline.flow.apart import Rowwise
from pipeline.flow.cells import deviation, live_key
from pipeline.flow.plan import Discovery, SitePlan
from pipeline.flow.tap import Tap
from pipeline.flow.values import Call
from pipeline.sites import Presentations

# statistics.md §4, relative to max(‖w‖‖x‖ + |b|)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}
# products w·x of the check of one call: some 30 ms of one core
CHECKED_PRODUCTS = 1 << 26


class Checking(Tap):
    """A tapped forward that compares instead of observing: `errors` by site, why any site `failed`, which are
    `unmasked` or `unlabelled`: the batch has a mask, or labels, of other positions than theirs. And what it shows of
    one `row`, what the model `returned`, and which sites were `shown` anything."""

    def __init__(self, model: nn.Module, discovery: Discovery, batch: Batch) -> None:
        super().__init__(model, discovery, batch, self._compare)
        self.errors: dict[str, float] = {}
        self.failed: dict[str, str] = {}
        self.shown: set[str] = set()
        self.unmasked: set[str] = set()
        self.unlabelled: set[str] = set()
        self.returned: Any = None
        # one in the middle: what stands at either end of a batch may be treated otherwise
        self.row = Rowwise(torch.arange(batch.rows) == batch.rows // 2)

    def _compare(self, presentations: Presentations) -> None:
        self.row.note(presentations)
        name = presentations.site.name
        if presentations.z_LSU.numel():
            self.shown.add(name)
        error = folding_error(presentations)
        tolerance = TOLERANCE.get(presentations.z_LSU.dtype, TOLERANCE[torch.float32])
        if self._presenter.masks_others(presentations):
            self.unmasked.add(name)
        if self._presenter.labels_others(presentations):
            self.unlabelled.add(name)
        if error is None:
            return
        self.errors[name] = max(self.errors.get(name, 0.0), error)
        if error > tolerance:
            self.failed[name] = (
                f"its pattern gives a w·x + b that differs from the model's own pre-activation by {error:.2g} of "
                f"‖w‖‖x‖ + |b|, more than {tolerance:g}"
            )

    def _meet_cells(self, call: Call, out: Any) -> None:
        super()._meet_cells(call, out)
        key = live_key(call, lambda weight: self.value_of(weight).key)
        plans = [plan for each in self._discovery.calls.get(key, ()) for plan in each]
        apart = deviation(call, out) if plans else 0.0
        tolerance = TOLERANCE.get(call.tensors[0].dtype, TOLERANCE[torch.float32])
        for plan in plans if apart > tolerance else ():
            self.failed[plan.site.name] = f"its gates replayed give a hidden state {apart:.2g} from the model's own"

    def fail(self, plan: SitePlan, error: Exception) -> None:
        """Remember why a site could not be presented, and go on."""
        if not isinstance(error, ModelError | RuntimeError | ValueError | IndexError):
            raise error
        self.failed[plan.site.name] = str(error)


def folding_error(presentations: Presentations) -> float | None:
    """max |w·x + b − z| / max(‖w‖‖x‖ + |b|) over explicit patches, in float64; None if none of them is finite.

    NaN and infinite ones are left out.
    Where there are many, over entries and positions spread evenly, the first and the last among them.
    """
    site = presentations.site
    z_LSU = presentations.z_LSU if presentations.affine_LSU is None else presentations.affine_LSU
    pattern_GUD = site.pattern_UD.to(z_LSU.device).view(site.groups, -1, site.fan_in)
    bias_U = site.bias_U.to(z_LSU.device)
    entries, positions = z_LSU.shape[:2]
    most = max(1, CHECKED_PRODUCTS // max(site.pattern_UD.numel(), 1))
    at_S = _spread(positions, most, z_LSU.device)
    worst, scale, compared = 0.0, 0.0, False
    for start, stop in _runs(_spread(entries, max(1, most // max(len(at_S), 1)), z_LSU.device).tolist()):
        x_LSGD = presentations.patches(start, stop)[:, at_S].double()
        made_LSU = torch.einsum("lsgd,gud->lsgu", x_LSGD, pattern_GUD).flatten(2) + bias_U
        length = x_LSGD.norm(dim=-1)[..., None] * pattern_GUD.norm(dim=-1)
        size_LSU = length.flatten(2) + bias_U.abs()
        difference_LSU = (made_LSU - z_LSU[start:stop, at_S].double()).abs()
        finite = torch.isfinite(difference_LSU) & torch.isfinite(size_LSU)
        if bool(finite.any()):
            compared = True
            worst = max(worst, float(difference_LSU[finite].max()))
            scale = max(scale, float(size_LSU[finite].max()))
    if not compared:
        return None
    return worst / scale if scale > 0 else worst


def _spread(count: int, most: int, device: torch.device) -> torch.Tensor:
    if count <= most:
        return torch.arange(count, device=device)
    return torch.unique(torch.linspace(0, count - 1, max(most, 2), device=device).long())


def _runs(entries: list[int]) -> list[tuple[int, int]]:
    """Entries that follow one another, as (first, last + 1).

    >>> _runs([0, 1, 2, 7])
    [(0, 3), (7, 8)]
    """
    runs: list[tuple[int, int]] = []
    for entry in entries:
        if runs and runs[-1][1] == entry:
            runs[-1] = (runs[-1][0], entry + 1)
        else:
            runs.append((entry, entry + 1))
    return runs
