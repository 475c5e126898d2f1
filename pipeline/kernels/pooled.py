"""Co-moments grown in place: the products of many slices are added up in the model's precision and merged as one.

Layer 1: pure torch, no I/O. The reference (`comoment.py`) centres both sides of every product and merges every slice in
float64, which costs more than the products themselves. Here only a and firing are centred, in their slice:
Σ(a − ā)(x − x̄) = Σ(a − ā)x, whatever x̄. That loses digits where the mean of x is far from 0 for its spread, so it is
looked at, and such slices, and all that hold anything not finite, huge or tiny, go to the reference.

Shapes: L entries and S positions of a slice, P = LS presentations, G groups, u units of a group, M rows of the left
operand, D fan-in, K slices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from pipeline.kernels import bulk, tiled
from pipeline.kernels.accumulate import Accumulator
from pipeline.kernels.base import Primitive, State
from pipeline.kernels.comoment import NARROW, CoMoment, slices
from pipeline.kernels.copied import copied
from pipeline.kernels.operands import Operands
from pipeline.kernels.thin import thinned
from pipeline.sites import Presentations, Site

# numbers of both sides of a slice, 8 MiB of float32
SLICE_NUMBERS = 1 << 21
# presentations whose products are added up in float32: rounding stays near 1e-7 of the sum, where it falls by chance
POOLED = 1 << 15
# slices of a pool, whose means are kept
KEPT = 64


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
        shown, fired = thinned(presentations, self._primitive.positions), self._primitive.fired
        narrow = presentations.site.fan_in < NARROW
        by_tiles = None if narrow else tiled.plan(shown, fired=fired)
        for start, stop in self._slices(shown) if by_tiles is None else by_tiles.slices():
            if by_tiles is not None:
                operands: Operands | None = by_tiles.operands(start, stop)
            else:
                operands = None if narrow else copied(shown, start, stop, fired=fired)
            if operands is None or not operands.sound():
                self._merge(self._primitive.of_slice(shown, start, stop))
                continue
            if self._pool is not None and not self._pool.takes(operands):
                self._merge(self._pool.state())
                self._pool = None
            self._pool = self._pool or _Pool(operands, presentations.site)
            self._pool.add(operands)
            self.pooled += operands.left.n

    def _slices(self, shown: Presentations) -> Iterator[tuple[int, int]]:
        site = shown.site
        # windows are copied block by block, but for those that are copied at once
        at_once = shown.windows is None or bulk.in_bulk(shown.z_LSU)
        width = site.groups * site.fan_in // (1 if at_once else 4) + 2 * site.units
        return slices(shown, width=width, numbers=SLICE_NUMBERS)

    def _merge(self, state: State) -> None:
        self._state = state if self._state is None else self._primitive.merge(self._state, state)

    def states(self) -> Mapping[Primitive, State]:
        """See `Accumulator`."""
        state = self._state
        if self._pool is not None:
            pooled = self._pool.state()
            state = pooled if state is None else self._primitive.merge(state, pooled)
        return {self._primitive: self._primitive.empty(self._site) if state is None else state}


class _Kept(NamedTuple):
    """Of one slice, beside its products: n, the sums of `LeftSums`, and the same of x; float64."""

    n: int
    about_Gu: torch.Tensor
    rest_Gu: torch.Tensor
    square_Gu: torch.Tensor
    fired_Gu: torch.Tensor | None
    rate_Gu: torch.Tensor | None
    x_about_GD: torch.Tensor
    x_rest_GD: torch.Tensor
    x_square_G: torch.Tensor


class _Pool:
    """Slices whose products are added up; the last row is the operands'."""

    def __init__(self, operands: Operands, site: Site) -> None:
        left, right = operands.left, operands.right
        groups, units = left.about_Gu.shape
        rows = units * (1 if left.fired_Gu is None else 2) + 1
        self._in_bulk = bulk.in_bulk(left.about_Gu)
        dtype = torch.float64 if self._in_bulk else None
        self.product_GMD = left.about_Gu.new_zeros((groups, rows, site.fan_in), dtype=dtype)
        self.taps = right.taps
        self._kept: list[_Kept] = []
        self._n = 0

    def takes(self, operands: Operands) -> bool:
        """Whether there is room for another slice, whose D is in the order of the others'."""
        room = len(self._kept) < KEPT and (self._in_bulk or self._n < POOLED)
        return room and self.taps == operands.right.taps

    def add(self, operands: Operands) -> None:
        """Add the products of a slice."""
        left, right = operands.left, operands.right
        x_rest_GD = operands.add_to(self.product_GMD)
        x_about_GD = torch.zeros_like(x_rest_GD) if right.about_GD is None else right.about_GD.double()
        about_Gu, rest_Gu, square_Gu = (one.double() for one in (left.about_Gu, left.rest_Gu, left.square_Gu))
        fired_Gu, rate_Gu = (None if one is None else one.double() for one in (left.fired_Gu, left.rate_Gu))
        x = (x_about_GD, x_rest_GD, right.square_G.double())
        self._kept.append(_Kept(left.n, about_Gu, rest_Gu, square_Gu, fired_Gu, rate_Gu, *x))
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
            fired_KGu, rate_KGu = self._each("fired_Gu"), self._each("rate_Gu")
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
