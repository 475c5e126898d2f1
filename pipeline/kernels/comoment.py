"""Co-moments of what a unit gives with what it is shown: Σ(a − ā)(x − x̄)ᵀ, and the same for firing.

Layer 1: pure torch, no I/O. Products are taken in the dtype of the model (float32 at least), of values centred in their
slice and scaled by powers of two, which loses nothing and keeps huge and tiny values in range; slices and batches are
merged in float64 by the pairwise update of Chan, Golub & LeVeque (1979). Inputs are asked for in slices of entries, so
memory does not grow with the batch.

Shapes: P presentations of a slice, G groups, u units of a group, K rows of the mean input (see `CoMoment`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch

from pipeline.kernels import bulk
from pipeline.kernels.base import Primitive, State
from pipeline.kernels.thin import SLICE_NUMBERS, thinned
from pipeline.sites import Presentations, Site

# 2^±100 and the sums of products of numbers scaled by it are normal float32 numbers
LARGEST_EXPONENT = 100
# of a matrix with fewer rows or columns a library may sum all products in one float32: equal terms, all rounded to the
# same side, then lose 1e-4 of 2^15. It is narrow enough to be multiplied in float64
NARROW = 8


class Centred(NamedTuple):
    """Deviations from the mean of the kept presentations, 0 where not kept: value − mean = rest · scale.

    mean_GK and scale_GK, a power of two, are float64; rest_GPK has the dtype of the values.
    """

    mean_GK: torch.Tensor
    rest_GPK: torch.Tensor
    scale_GK: torch.Tensor


def slices(presentations: Presentations, *, width: int, numbers: int | None = None) -> Iterator[tuple[int, int]]:
    """Runs of entries with about `numbers` numbers, `width` of them at each position; one entry at least.

    `numbers` is `SLICE_NUMBERS` unless given; on a GPU it is `bulk.NUMBERS`, of `bulk.PRESENTATIONS` at most.
    """
    positions, numbers = max(1, presentations.positions), numbers or SLICE_NUMBERS
    if bulk.in_bulk(presentations.z_LSU):
        numbers = min(bulk.NUMBERS, bulk.PRESENTATIONS * width)
    step = max(1, numbers // max(1, positions * width))
    for start in range(0, presentations.entries, step):
        yield start, min(start + step, presentations.entries)


def observe_slices(
    primitive: Primitive,
    presentations: Presentations,
    observe_slice: Callable[[Presentations, int, int], State],
    *,
    width: int,
    numbers: int | None = None,
) -> State:
    """The merged states of a batch's slices; the empty state, on the batch's device, where it has no entries."""
    parts = slices(presentations, width=width, numbers=numbers)
    states = (observe_slice(presentations, start, stop) for start, stop in parts)
    first = next(states, None)
    if first is None:
        device = presentations.z_LSU.device
        return {name: value.to(device) for name, value in primitive.empty(presentations.site).items()}
    return reduce(primitive.merge, states, first)


def as_float(values: torch.Tensor) -> torch.Tensor:
    """The values in float32 or float64: half precision is widened before anything is summed."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def all_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite: where their sum is finite, which is 15 × faster to see than each of them."""
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())


def slice_inputs(presentations: Presentations, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x of a slice as (G, P, D), and bool (G, P, 1) where it counts: not masked, all finite; None if everywhere."""
    x_GPD = as_float(presentations.patches(start, stop).flatten(0, 1).movedim(1, 0))
    seen_GP1 = None
    if presentations.mask_LS is not None:
        seen_GP1 = presentations.mask_LS[start:stop].reshape(1, -1, 1).expand(*x_GPD.shape[:2], 1)
    if not all_finite(x_GPD):
        finite_GP1 = x_GPD.isfinite().all(-1, keepdim=True)
        seen_GP1 = finite_GP1 if seen_GP1 is None else seen_GP1 & finite_GP1
    return x_GPD, seen_GP1


def slice_units(values_LSU: torch.Tensor, start: int, stop: int, *, groups: int) -> torch.Tensor:
    """Values of a slice's units as (G, P, u)."""
    values_PU = as_float(values_LSU[start:stop].flatten(0, 1))
    return values_PU.view(len(values_PU), groups, -1).movedim(1, 0)


def kept_counts(kept_GPK: torch.Tensor | None, value_GPK: torch.Tensor) -> torch.Tensor:
    """How many presentations are kept, int64 (G, K or 1)."""
    if kept_GPK is not None:
        return kept_GPK.sum(1)
    groups, presentations, _ = value_GPK.shape
    return torch.full((groups, 1), presentations, device=value_GPK.device)


def centred(value_GPK: torch.Tensor, kept_GPK: torch.Tensor | None) -> Centred:
    """Centre in two steps: equal values become exactly 0, and a large mean costs the deviations no digits."""
    if kept_GPK is not None:
        value_GPK = value_GPK.masked_fill(~kept_GPK, 0)
    exponent_GK = torch.frexp(value_GPK.abs().amax(1))[1].clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)
    scale_GK = torch.exp2(exponent_GK.double())
    rest_GPK = value_GPK * scale_GK.reciprocal().to(value_GPK.dtype)[:, None]
    n_GK = kept_counts(kept_GPK, value_GPK).clamp(min=1)
    rough_GK = rest_GPK.sum(1) / n_GK
    _shift(rest_GPK, rough_GK, kept_GPK)
    if bulk.in_bulk(rest_GPK):
        fine_GK = rest_GPK.sum(1, dtype=torch.float64) / n_GK
    else:
        # as a product with ones, four times as fast as a sum that widens
        ones_1P = torch.ones((1, rest_GPK.shape[1]), dtype=torch.float64)
        fine_GK = (ones_1P @ rest_GPK.double())[:, 0] / n_GK
    _shift(rest_GPK, fine_GK, kept_GPK)
    return Centred((rough_GK.double() + fine_GK) * scale_GK, rest_GPK, scale_GK)


def _shift(rest_GPK: torch.Tensor, step_GK: torch.Tensor, kept_GPK: torch.Tensor | None) -> None:
    rest_GPK -= step_GK[:, None].to(rest_GPK.dtype)
    if kept_GPK is not None:
        rest_GPK *= kept_GPK


def products(left: Centred, right: Centred) -> torch.Tensor:
    """Σ over the presentations of left × right, float64 (G, left's K, right's K)."""
    one, other = left.rest_GPK, right.rest_GPK
    if min(one.shape[2], other.shape[2]) < NARROW:
        one, other = one.double(), other.double()
    product_GKK = bulk.multiply(one.mT, other) if bulk.in_bulk(one) else (one.mT @ other).double()
    return product_GKK.mul_(left.scale_GK[:, :, None]).mul_(right.scale_GK[:, None])


def squares(values: Centred) -> torch.Tensor:
    """Σ over the presentations of the squared deviations, float64 (G, K)."""
    square_GPK = values.rest_GPK.square()
    square_GK = square_GPK.sum(1, dtype=torch.float64) if bulk.in_bulk(square_GPK) else square_GPK.sum(1).double()
    return square_GK * values.scale_GK.square()


def plus_outer(sum_UD: torch.Tensor, left_U: torch.Tensor, right_KD: torch.Tensor) -> torch.Tensor:
    """The sum plus left ⊗ right, where each row of right serves U / K consecutive units. Takes the sum's memory."""
    rows = len(right_KD)
    sum_UD.view(rows, -1, sum_UD.shape[1]).baddbmm_(left_U.view(rows, -1, 1), right_KD[:, None])
    return sum_UD


@dataclass(frozen=True)
class CoMoment(Primitive):
    """Co-moments of each unit's a, and of whether it fires, with its D inputs, over the unit's own presentations.

    Left out of a unit's presentations: masked ones, those whose x is not finite, and those at which z or a of the unit
    is not finite. All units of a group then have the same mean input, so K = G rows hold it, until a value of a single
    unit was left out anywhere: then K = U.

    n_U       int64, presentations
    a_mean_U, a_m2_U     mean of a and Σ(a − ā)²
    x_mean_KD, x_m2_K    mean of x and Σ‖x − x̄‖²
    cov_UD    Σ(a − ā)(x − x̄)
    n_fired_U int64, fired_UD   presentations with z > 0, and Σ over them of (x − x̄); only where `fired`

    `positions` bounds the positions taken of each entry, see `thin.py`.
    """

    fired: bool = True
    positions: int = 1 << 30

    def empty(self, site: Site) -> State:
        """Nothing seen: K = G."""
        units, groups, fan_in = site.units, site.groups, site.fan_in
        floats = {
            "a_mean_U": (units,),
            "a_m2_U": (units,),
            "x_mean_KD": (groups, fan_in),
            "x_m2_K": (groups,),
            "cov_UD": (units, fan_in),
            **({"fired_UD": (units, fan_in)} if self.fired else {}),
        }
        counts = ("n_U", "n_fired_U") if self.fired else ("n_U",)
        state = {name: torch.zeros(units, dtype=torch.int64) for name in counts}
        return state | {name: torch.zeros(shape, dtype=torch.float64) for name, shape in floats.items()}

    def forms(self, site: Site) -> tuple[State, ...]:
        """K = G, and K = U."""
        by_group = self.empty(site)
        return by_group, _with_rows(by_group, site.units)

    def observe(self, presentations: Presentations) -> State:
        """Merge the co-moments of the batch's slices."""
        site, sample = presentations.site, thinned(presentations, self.positions)
        return observe_slices(self, sample, self.of_slice, width=site.groups * site.fan_in)

    def merge(self, left: State, right: State) -> State:
        """Chan's update of a mean and a co-moment, n and means taken per unit."""
        rows = max(len(left["x_mean_KD"]), len(right["x_mean_KD"]))
        left, right = _with_rows(left, rows), _with_rows(right, rows)
        n_U = left["n_U"] + right["n_U"]
        share_U = right["n_U"].double() / n_U.clamp(min=1)
        weight_U = left["n_U"] * share_U
        share_K, weight_K = (value.view(rows, -1)[:, 0] for value in (share_U, weight_U))
        a_step_U = right["a_mean_U"] - left["a_mean_U"]
        x_step_KD = right["x_mean_KD"] - left["x_mean_KD"]
        state = {
            "n_U": n_U,
            "a_mean_U": left["a_mean_U"] + a_step_U * share_U,
            "a_m2_U": left["a_m2_U"] + right["a_m2_U"] + weight_U * a_step_U.square(),
            "x_mean_KD": left["x_mean_KD"] + x_step_KD * share_K[:, None],
            "x_m2_K": left["x_m2_K"] + right["x_m2_K"] + weight_K * x_step_KD.square().sum(-1),
            "cov_UD": plus_outer(left["cov_UD"] + right["cov_UD"], weight_U * a_step_U, x_step_KD),
        }
        if self.fired:
            rate_step_U = _rate(right) - _rate(left)
            state["n_fired_U"] = left["n_fired_U"] + right["n_fired_U"]
            state["fired_UD"] = plus_outer(left["fired_UD"] + right["fired_UD"], weight_U * rate_step_U, x_step_KD)
        return state

    def of_slice(self, presentations: Presentations, start: int, stop: int) -> State:
        """The co-moments of the entries start … stop, both sides centred: right for all numbers."""
        groups = presentations.site.groups
        x_GPD, seen_GP1 = slice_inputs(presentations, start, stop)
        z_GPu = slice_units(presentations.z_LSU, start, stop, groups=groups)
        a_GPu = slice_units(presentations.a_LSU, start, stop, groups=groups)
        valid_GPu = seen_GP1
        if not (all_finite(z_GPu) and all_finite(a_GPu)):
            finite_GPu = z_GPu.isfinite() & a_GPu.isfinite()
            valid_GPu = finite_GPu if seen_GP1 is None else finite_GPu & seen_GP1
        x, a = centred(x_GPD, seen_GP1), centred(a_GPu, valid_GPu)
        state = {
            "n_U": kept_counts(valid_GPu, z_GPu).expand(groups, z_GPu.shape[2]).flatten(),
            "a_mean_U": a.mean_GK.flatten(),
            "a_m2_U": squares(a).flatten(),
            **_input_mean(x, seen_GP1, valid_GPu),
            "cov_UD": products(a, x).flatten(0, 1),
        }
        if self.fired:
            # as float numbers: comparing and converting takes 5 × as long, and float32 counts a slice exactly
            fired_GPu = (z_GPu if valid_GPu is None else z_GPu.masked_fill(~valid_GPu, 0)).sign().clamp(min=0)
            state["n_fired_U"] = fired_GPu.sum(1).long().flatten()
            state["fired_UD"] = products(centred(fired_GPu, valid_GPu), x).flatten(0, 1)
        return state


def _rate(state: State) -> torch.Tensor:
    return state["n_fired_U"].double() / state["n_U"].clamp(min=1)


def _with_rows(state: State, rows: int) -> State:
    repeats = rows // len(state["x_mean_KD"])
    return state | {name: state[name].repeat_interleave(repeats, 0) for name in ("x_mean_KD", "x_m2_K") if repeats > 1}


def _input_mean(x: Centred, seen_GP1: torch.Tensor | None, valid_GPu: torch.Tensor | None) -> State:
    """Mean of x and Σ‖x − x̄‖²: by group, or by unit where the units of a group saw different presentations."""
    if valid_GPu is None or bool((valid_GPu.sum(1) == kept_counts(seen_GP1, x.rest_GPK)).all()):
        return {"x_mean_KD": x.mean_GK, "x_m2_K": squares(x).sum(-1)}
    n_Gu1 = valid_GPu.sum(1)[..., None]
    valid_GuP = valid_GPu.mT.double()
    rest_GPD = x.rest_GPK.double() * x.scale_GK[:, None]
    shift_GuD = valid_GuP @ rest_GPD / n_Gu1.clamp(min=1)
    square_Gu1 = valid_GuP @ rest_GPD.square().sum(-1, keepdim=True) - n_Gu1 * shift_GuD.square().sum(-1, keepdim=True)
    mean_GuD = torch.where(n_Gu1 > 0, x.mean_GK[:, None] + shift_GuD, 0.0)
    return {"x_mean_KD": mean_GuD.flatten(0, 1), "x_m2_K": square_Gu1.clamp(min=0).flatten()}


@dataclass(frozen=True)
class InputCovariance(Primitive):
    """The covariance of the inputs of each group: n_G int64, mean_GD, and m2_GDD = Σ(x − x̄)(x − x̄)ᵀ in float64.

    Over the unmasked presentations whose x is finite, whatever the units made of them; `positions` bounds the positions
    taken of each entry, see `thin.py`.
    """

    positions: int = 1 << 30

    def empty(self, site: Site) -> State:
        """Nothing seen."""
        groups, fan_in = site.groups, site.fan_in
        return {
            "n_G": torch.zeros(groups, dtype=torch.int64),
            "mean_GD": torch.zeros((groups, fan_in), dtype=torch.float64),
            "m2_GDD": torch.zeros((groups, fan_in, fan_in), dtype=torch.float64),
        }

    def observe(self, presentations: Presentations) -> State:
        """Merge the second moments of the batch's slices."""
        site, sample = presentations.site, thinned(presentations, self.positions)
        return observe_slices(self, sample, self._slice, width=site.groups * site.fan_in)

    def merge(self, left: State, right: State) -> State:
        """Chan's update of a mean and a second moment."""
        n_G = left["n_G"] + right["n_G"]
        share_G = right["n_G"].double() / n_G.clamp(min=1)
        step_GD = right["mean_GD"] - left["mean_GD"]
        weighted_GD = (left["n_G"] * share_G)[:, None] * step_GD
        return {
            "n_G": n_G,
            "mean_GD": left["mean_GD"] + step_GD * share_G[:, None],
            "m2_GDD": (left["m2_GDD"] + right["m2_GDD"]).baddbmm_(weighted_GD[:, :, None], step_GD[:, None]),
        }

    def _slice(self, presentations: Presentations, start: int, stop: int) -> State:
        x_GPD, seen_GP1 = slice_inputs(presentations, start, stop)
        x = centred(x_GPD, seen_GP1)
        return {"n_G": kept_counts(seen_GP1, x_GPD)[:, 0], "mean_GD": x.mean_GK, "m2_GDD": products(x, x)}
