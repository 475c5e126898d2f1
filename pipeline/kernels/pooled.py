"""Co-moments grown in place: the products of many slices are added up in the model's precision and merged as one.

Layer 1: pure torch, no I/O. The reference (`comoment.py`) centres both sides of every product and merges every slice in
float64, which costs more than the products themselves. Here only a and firing are centred, in their slice:
Σ(a − ā)(x − x̄) = Σ(a − ā)x, whatever x̄. That loses digits where the mean of x is far from 0 for its spread, so it is
looked at, and such slices, and all that hold anything not finite, huge or tiny, go to the reference.

Shapes: L entries and S positions of a slice, P = LS presentations, G groups, u units of a group, M rows of the left
operand, D fan-in, K slices.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from pipeline.kernels import native_deviations
from pipeline.kernels.accumulate import Accumulator
from pipeline.kernels.base import Primitive, State
from pipeline.kernels.comoment import NARROW, CoMoment, as_float, slices
from pipeline.kernels.thin import thinned
from pipeline.sites import Presentations, Site, Windows

# numbers of both sides of a slice, 8 MiB of float32
SLICE_NUMBERS = 1 << 21
# numbers of a window's copies at a time, 4 MiB, into the same memory: it stays in the caches
BLOCK_NUMBERS = 1 << 20
# numbers that are kept to be written over, 16 MiB: only memory that is used takes any
SCRATCH_NUMBERS = 1 << 22
# presentations whose products are added up in float32: rounding stays near 1e-7 of the sum, where it falls by chance
POOLED = 1 << 15
# presentations of one product: equal terms are all rounded to the same side, and a sum loses more with each
LONGEST = 512
# slices of a pool, whose means are kept
KEPT = 16
# Σ of squared means over Σ of variances of the inputs up to which x need not be centred
FAR = 8.0
# sums of squares beyond 2^±60 are left to the reference: their products leave float32's range
LARGEST = 2.0**60


class Pooled(Accumulator):
    """The state of one `CoMoment` at one site."""

    def __init__(self, site: Site, primitive: CoMoment) -> None:
        self._site = site
        self._primitive = primitive
        self._state: State | None = None
        self._pool: _Pool | None = None
        # presentations that needed no reference
        self.pooled = 0

    def add(self, presentations: Presentations) -> None:
        """See `Accumulator`."""
        site, shown = presentations.site, thinned(presentations, self._primitive.positions)
        # windows are copied block by block
        width = site.groups * site.fan_in // (1 if shown.windows is None else 4) + 2 * site.units
        for start, stop in slices(shown, width=width, numbers=SLICE_NUMBERS):
            narrow = site.fan_in < NARROW
            left = None if narrow else _left(shown, start, stop, fired=self._primitive.fired)
            right = None if left is None else _right(shown, start, stop, left.kept_P)
            if left is None or right is None or not _sound(left, right):
                self._merge(self._primitive.of_slice(shown, start, stop))
                continue
            if self._pool is not None and not self._pool.takes(right):
                self._merge(self._pool.state())
                self._pool = None
            self._pool = self._pool or _Pool(left, right, site.fan_in)
            self._pool.add(left, right)
            self.pooled += left.n

    def _merge(self, state: State) -> None:
        self._state = state if self._state is None else self._primitive.merge(self._state, state)

    def states(self) -> Mapping[Primitive, State]:
        """See `Accumulator`."""
        state = self._state
        if self._pool is not None:
            pooled = self._pool.state()
            state = pooled if state is None else self._primitive.merge(state, pooled)
        return {self._primitive: self._primitive.empty(self._site) if state is None else state}


class _Left(NamedTuple):
    """Rows of a slice's left operand (a − about, whether it fires − rate, 1) and their sums, by group.

    `kept_P` are the unmasked presentations, None if all are; `fired_Gu` is None where firing is not asked for.
    """

    rows_GMP: torch.Tensor
    about_Gu: torch.Tensor
    rest_Gu: torch.Tensor
    square_Gu: torch.Tensor
    fired_Gu: torch.Tensor | None
    kept_P: torch.Tensor | None

    @property
    def n(self) -> int:
        """Presentations."""
        return self.rows_GMP.shape[2]


@dataclass(frozen=True, eq=False)
class _Right:
    """x of a slice, as windows or (G, P, D) less `about_GD`; Σ of its squares, and about n‖x̄‖², by group."""

    x: torch.Tensor | Windows
    square_G: torch.Tensor
    about_GD: torch.Tensor | None
    far_G: torch.Tensor

    @property
    def taps(self) -> int | None:
        """How many taps come before the channels in D; None where D is as that of the patterns."""
        return math.prod(self.x.x_LsGTC.shape[_taps(self.x)]) if isinstance(self.x, Windows) else None

    def blocks(self) -> Iterator[torch.Tensor]:
        """x in order, (G, p, D) each; a block is overwritten by the next."""
        if not isinstance(self.x, Windows):
            yield self.x
            return
        x_LsGTC = self.x.x_LsGTC
        step = max(1, BLOCK_NUMBERS // max(1, x_LsGTC[:1].numel()))
        memory = x_LsGTC.new_empty(x_LsGTC[:step].shape)
        for part in x_LsGTC.split(step):
            yield _explicit(memory[: len(part)].copy_(part))


def _taps(windows: Windows) -> slice:
    dims = (windows.x_LsGTC.dim() - 3) // 2
    return slice(dims + 2, -1)


def _explicit(x_LsGTC: torch.Tensor) -> torch.Tensor:
    """Windows as (G, P, D), a view where they are contiguous."""
    dims = (x_LsGTC.dim() - 3) // 2
    return x_LsGTC.flatten(dims + 2).flatten(0, dims).transpose(0, 1)


def _left(shown: Presentations, start: int, stop: int, *, fired: bool) -> _Left | None:
    """The left operand of a slice; None where nothing is left of it, or z is not finite."""
    groups = shown.site.groups
    z_GuLS, a_GuLS = (
        value_LSU[start:stop].permute(2, 0, 1).unflatten(0, (groups, -1)) for value_LSU in (shown.z_LSU, shown.a_LSU)
    )
    kept_P = None
    if shown.mask_LS is not None:
        kept_P = shown.mask_LS[start:stop].flatten().nonzero()[:, 0]
        z_GuLS, a_GuLS = (value.flatten(2)[:, :, None, kept_P] for value in (z_GuLS, a_GuLS))
    n, units = z_GuLS[0, 0].numel(), z_GuLS.shape[1]
    if n and native_deviations.takes(z_GuLS, a_GuLS):
        z_is_a = shown.z_LSU is shown.a_LSU and not fired
        return _native(None if z_is_a else z_GuLS, a_GuLS, kept_P, fired=fired)
    if n == 0 or not (shown.z_LSU is shown.a_LSU or bool(z_GuLS.sum(dtype=_wide(z_GuLS)).isfinite())):
        return None
    rows_GMLS = _beside(a_GuLS, rows=units * (1 + fired) + 1)
    about_Gu = _about(a_GuLS, n)
    rest_GuLS = torch.sub(a_GuLS, about_Gu[..., None, None], out=rows_GMLS[:, :units])
    fired_Gu = None
    if fired:
        fired_GuLS = torch.gt(z_GuLS, 0, out=rows_GMLS[:, units:-1])
        # float32 counts the presentations of a slice exactly
        fired_Gu = _sums(fired_GuLS).to(fired_GuLS.dtype)
        fired_GuLS -= (fired_Gu / n)[..., None, None]
    rows_GMLS[:, -1] = 1
    return _Left(rows_GMLS.flatten(2), about_Gu, _sums(rest_GuLS), _sums(rest_GuLS.square()), fired_Gu, kept_P)


def _native(
    z_GuLS: torch.Tensor | None, a_GuLS: torch.Tensor, kept_P: torch.Tensor | None, *, fired: bool
) -> _Left | None:
    """The same by the native kernel."""
    units = a_GuLS.shape[1]
    numbers = (units * (1 + fired) + 1) * a_GuLS[:, 0].numel()
    rows_GMLS = _beside(a_GuLS, rows=units * (1 + fired) + 1, memory=_SCRATCH.of("left", numbers))
    found = native_deviations.deviations(
        z_GuLS, a_GuLS, rows_GMLS[:, :units], rows_GMLS[:, units:-1] if fired else None
    )
    if found is None:
        return None
    rows_GMLS[:, -1] = 1
    about_Gu, rest_Gu, square_Gu, fired_Gu = found
    return _Left(rows_GMLS.flatten(2), about_Gu, rest_Gu, square_Gu, fired_Gu if fired else None, kept_P)


def _sums(value_GuLS: torch.Tensor) -> torch.Tensor:
    """Σ over the presentations, float64 (G, u), as a product with ones where units lie side by side: sums are slow."""
    if value_GuLS.stride(1) != 1:
        return value_GuLS.sum((2, 3), dtype=torch.float64)
    value_GPu = value_GuLS.double().flatten(2).transpose(1, 2)
    return (value_GPu.new_ones((1, 1, value_GPu.shape[1])) @ value_GPu)[:, 0]


def _wide(value: torch.Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)


def _beside(a_GuLS: torch.Tensor, *, rows: int, memory: torch.Tensor | None = None) -> torch.Tensor:
    """Memory for rows (G, M, L, S) in the order of a's own: units, or positions, side by side."""
    groups, units, *shape = a_GuLS.shape
    if memory is None:
        memory = a_GuLS.new_empty(groups * rows * math.prod(shape), dtype=_wide(a_GuLS))
    if units > 1 and a_GuLS.stride(1) == 1:
        return memory.view(*shape, groups, rows).permute(2, 3, 0, 1)
    return memory.view(groups, rows, *shape)


class _Scratch(threading.local):
    """Memory that one slice after the other is written to: new pages cost more than the numbers in them."""

    def __init__(self) -> None:
        self._kept: dict[str, torch.Tensor] = {}

    def of(self, name: str, numbers: int) -> torch.Tensor:
        """So many float32 numbers, anything; the caller's until the next call by this name in this thread."""
        if numbers > SCRATCH_NUMBERS:
            return torch.empty(numbers)
        if name not in self._kept:
            # one that was made in inference mode could not be written to outside
            with torch.inference_mode(False):
                self._kept[name] = torch.empty(SCRATCH_NUMBERS)
        return self._kept[name][:numbers]


_SCRATCH = _Scratch()


def _about(a_GuLS: torch.Tensor, n: int) -> torch.Tensor:
    """A number near each unit's mean; of equal values that value itself, so that nothing is left of them."""
    mean_Gu = (_sums(a_GuLS) / n).to(_wide(a_GuLS))
    first_Gu = a_GuLS[..., 0, 0].to(mean_Gu.dtype)
    # a sum of equal float32 values may be off by more than their last bit
    return torch.where((first_Gu - mean_Gu).abs() <= 2.0**-12 * mean_Gu.abs(), first_Gu, mean_Gu)


def _right(shown: Presentations, start: int, stop: int, kept_P: torch.Tensor | None) -> _Right:
    if shown.windows is not None and kept_P is None:
        windows = shown.windows(start, stop)
        return _Right(windows, windows.square_G, None, windows.far_G)
    x_GPD = as_float(shown.patches(start, stop)).flatten(0, 1).transpose(0, 1)
    x_GPD = x_GPD if kept_P is None else x_GPD[:, kept_P]
    if x_GPD.shape[1] and native_deviations.takes(x_GPD):
        rest_GPD = _SCRATCH.of("right", x_GPD.numel()).view(x_GPD.transpose(0, 1).shape).transpose(0, 1)
        inputs, rest = (one.transpose(1, 2)[:, :, None] for one in (x_GPD, rest_GPD))
        found = native_deviations.deviations(None, inputs, rest, None)
        if found is not None:
            square_G = found.square_Gu.sum(1)
            return _Right(rest_GPD, square_G, found.about_Gu, torch.zeros_like(square_G))
    about_GD = _about(x_GPD.transpose(1, 2)[..., None], x_GPD.shape[1])
    rest_GPD = (x_GPD.transpose(0, 1) - about_GD).transpose(0, 1)
    square_G = torch.linalg.vector_norm(rest_GPD, dim=-1).square().sum(1)
    return _Right(rest_GPD, square_G, about_GD, torch.zeros_like(square_G))


def _sound(left: _Left, right: _Right) -> bool:
    """Whether products of the slice keep their digits: all finite, of usual size, x not far from 0 for its spread."""
    usual = (left.square_Gu >= 1 / LARGEST) & (left.square_Gu <= LARGEST)
    still_Gu = left.square_Gu == 0
    if bool(still_Gu.any()):
        # squares may vanish where the values have not
        usual[still_Gu] = ~left.rows_GMP[:, : still_Gu.shape[1]][still_Gu].any(1)
    near_G = (1 + FAR) * right.far_G <= FAR * right.square_G
    near_G &= (right.square_G <= LARGEST) & (right.square_G >= 1 / LARGEST)
    return bool(usual.all() & near_G.all())


class _Kept(NamedTuple):
    """Of one slice, beside its products: n, the sums of `_Left`, and the same of x; float64."""

    n: int
    about_Gu: torch.Tensor
    rest_Gu: torch.Tensor
    square_Gu: torch.Tensor
    fired_Gu: torch.Tensor | None
    x_about_GD: torch.Tensor
    x_rest_GD: torch.Tensor
    x_square_G: torch.Tensor


class _Pool:
    """Slices whose products are added up; its last row is of the latest slice alone: Σx."""

    def __init__(self, left: _Left, right: _Right, fan_in: int) -> None:
        groups, rows, _ = left.rows_GMP.shape
        self.product_GMD = left.rows_GMP.new_zeros((groups, rows, fan_in))
        self.taps = right.taps
        self._kept: list[_Kept] = []
        self._n = 0

    def takes(self, right: _Right) -> bool:
        """Whether there is room for another slice, whose D is in the order of the others'."""
        return self.taps == right.taps and len(self._kept) < KEPT and self._n < POOLED

    def add(self, left: _Left, right: _Right) -> None:
        """Add the products of a slice."""
        self.product_GMD[:, -1] = 0
        done = 0
        for x_GpD in (part for block in right.blocks() for part in block.split(LONGEST, dim=1)):
            rows_GMp = left.rows_GMP[..., done : done + x_GpD.shape[1]]
            done += x_GpD.shape[1]
            if len(self.product_GMD) == 1:
                self.product_GMD[0].addmm_(rows_GMp[0], x_GpD[0])
            else:
                self.product_GMD.baddbmm_(rows_GMp, x_GpD)
        # a copy: the row is written anew by the next slice
        x_rest_GD = self.product_GMD[:, -1].to(torch.float64, copy=True)
        x_about_GD = torch.zeros_like(x_rest_GD) if right.about_GD is None else right.about_GD.double()
        fired_Gu = None if left.fired_Gu is None else left.fired_Gu.double()
        about_Gu, rest_Gu, square_Gu = (one.double() for one in (left.about_Gu, left.rest_Gu, left.square_Gu))
        sums = (about_Gu, rest_Gu, square_Gu, fired_Gu, x_about_GD, x_rest_GD, right.square_G.double())
        self._kept.append(_Kept(left.n, *sums))
        self._n += left.n

    def state(self) -> State:
        """The state of all slices: their products, and those of their means."""
        n_K = torch.tensor([one.n for one in self._kept], dtype=torch.float64, device=self.product_GMD.device)
        a = _means(n_K, self._each("about_Gu"), self._each("rest_Gu"))
        x = _means(n_K, self._each("x_about_GD"), self._each("x_rest_GD"))
        units = a.mean_Gu.shape[1]
        state = {
            "n_U": torch.full_like(a.mean_Gu, self._n, dtype=torch.int64).flatten(),
            "a_mean_U": a.mean_Gu.flatten(),
            "a_m2_U": (self._each("square_Gu").sum(0) + a.between_Gu).clamp(min=0).flatten(),
            "x_mean_KD": self._as_w(x.mean_Gu),
            "x_m2_K": (self._each("x_square_G").sum(0) + x.between_Gu.sum(-1)).clamp(min=0),
            "cov_UD": self._covariance(self.product_GMD[:, :units], a, x, n_K),
        }
        if self._kept[0].fired_Gu is not None:
            fired_KGu, dtype = self._each("fired_Gu"), self.product_GMD.dtype
            # what was subtracted, to the bit
            rate_KGu = (fired_KGu.to(dtype) / n_K.to(dtype)[:, None, None]).double()
            fired = _means(n_K, rate_KGu, fired_KGu - n_K[:, None, None] * rate_KGu)
            state["n_fired_U"] = fired_KGu.sum(0).long().flatten()
            state["fired_UD"] = self._covariance(self.product_GMD[:, units:-1], fired, x, n_K)
        return state

    def _each(self, name: str) -> torch.Tensor:
        """A number of every slice, stacked."""
        return torch.stack([getattr(one, name) for one in self._kept])

    def _covariance(self, product_GuD: torch.Tensor, a: _Means, x: _Means, n_K: torch.Tensor) -> torch.Tensor:
        """Σ(a − ā)(x − x̄) from the products of what is left of both in each slice, and their means there."""
        n_K11 = n_K[:, None, None]
        steps = torch.cat([n_K11 * a.step_KGu, -a.left_KGu]).permute(1, 2, 0)
        means = torch.cat([x.step_KGu, x.left_KGu / n_K11]).transpose(0, 1)
        return self._as_w((steps @ means + product_GuD).flatten(0, 1))

    def _as_w(self, value_KD: torch.Tensor) -> torch.Tensor:
        """The numbers of D in the order of the patterns."""
        if self.taps is None:
            return value_KD
        return value_KD.unflatten(1, (self.taps, -1)).transpose(1, 2).flatten(1)


class _Means(NamedTuple):
    """Of slices of n presentations: the mean, what it adds to Σ of squares, and per slice how far its mean is from it
    and what its deviations from `about` add up to.
    """

    mean_Gu: torch.Tensor
    between_Gu: torch.Tensor
    step_KGu: torch.Tensor
    left_KGu: torch.Tensor


def _means(n_K: torch.Tensor, about_KGu: torch.Tensor, rest_KGu: torch.Tensor) -> _Means:
    n_K11 = n_K[:, None, None]
    # from the first one on, so that equal values leave exactly 0
    step_KGu = about_KGu - about_KGu[0] + rest_KGu / n_K11
    shift_Gu = (n_K11 * step_KGu).sum(0) / n_K.sum()
    step_KGu = step_KGu - shift_Gu
    between_Gu = (n_K11 * step_KGu.square() - rest_KGu.square() / n_K11).sum(0)
    return _Means(about_KGu[0] + shift_Gu, between_Gu, step_KGu, rest_KGu)
