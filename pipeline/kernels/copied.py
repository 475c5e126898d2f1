"""Both sides of a slice's products as matrices in memory, of whatever type: where there is no better way to multiply.

Layer 1: pure torch, no I/O. Shapes as in `pooled.py`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from pipeline.input_forms import LaidWindows
from pipeline.kernels import bulk, native_deviations
from pipeline.kernels.comoment import as_float
from pipeline.kernels.operands import LeftSums, Operands, RightSums
from pipeline.sites import Presentations

# numbers of a window's copies at a time, 4 MiB, into the same memory: it stays in the caches
BLOCK_NUMBERS = 1 << 20
# numbers that are kept to be written over, 16 MiB: only memory that is used takes any
SCRATCH_NUMBERS = 1 << 22


class Copied(Operands):
    """Matrices of both sides."""

    def __init__(self, left: _Left, right: _Right) -> None:
        n, fired_Gu = left.n, left.fired_Gu
        still_Gu = left.square_Gu == 0
        # squares may vanish where the values have not
        if bulk.in_bulk(still_Gu):
            still_Gu &= ~left.rows_GMP[:, : still_Gu.shape[1]].any(2)
        elif bool(still_Gu.any()):
            still_Gu[still_Gu.clone()] = ~left.rows_GMP[:, : still_Gu.shape[1]][still_Gu].any(1)
        # what was subtracted, to the bit
        rate_Gu = None if fired_Gu is None else fired_Gu.to(left.rows_GMP.dtype) / n
        self.left = LeftSums(n, left.about_Gu, left.rest_Gu, left.square_Gu, fired_Gu, rate_Gu, still_Gu)
        self.right = RightSums(right.about_GD, right.square_G, right.far_G, right.taps)
        self._rows_GMP, self._x = left.rows_GMP, right

    def add_to(self, product_GMD: torch.Tensor) -> torch.Tensor:
        """See `Operands`."""
        if bulk.in_bulk(product_GMD):
            found_GMD = bulk.multiply(self._rows_GMP, self._x.whole())
            product_GMD += found_GMD
            return found_GMD[:, -1]
        product_GMD[:, -1] = 0
        done = 0
        for x_GpD in (part for block in self._x.blocks() for part in block.split(bulk.LONGEST, dim=1)):
            rows_GMp = self._rows_GMP[..., done : done + x_GpD.shape[1]]
            done += x_GpD.shape[1]
            if len(product_GMD) == 1:
                product_GMD[0].addmm_(rows_GMp[0], x_GpD[0])
            else:
                product_GMD.baddbmm_(rows_GMp, x_GpD)
        # a copy: the row is written anew by the next slice
        return product_GMD[:, -1].to(torch.float64, copy=True)


def copied(shown: Presentations, start: int, stop: int, *, fired: bool) -> Copied | None:
    """The operands of the entries start … stop; None where nothing is left of them, or z is not finite."""
    left = _left(shown, start, stop, fired=fired)
    return None if left is None else Copied(left, _right(shown, start, stop, left.kept_P))


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

    x: torch.Tensor | LaidWindows
    square_G: torch.Tensor
    about_GD: torch.Tensor | None
    far_G: torch.Tensor

    @property
    def taps(self) -> int | None:
        """How many taps come before the channels in D; None where D is as that of the patterns."""
        return math.prod(self.x.x_LsGTC.shape[_taps(self.x)]) if isinstance(self.x, LaidWindows) else None

    def whole(self) -> torch.Tensor:
        """x at once, (G, P, D)."""
        return _explicit(self.x.x_LsGTC.contiguous()) if isinstance(self.x, LaidWindows) else self.x

    def blocks(self) -> Iterator[torch.Tensor]:
        """x in order, (G, p, D) each; a block is overwritten by the next."""
        if not isinstance(self.x, LaidWindows):
            yield self.x
            return
        x_LsGTC = self.x.x_LsGTC
        step = max(1, BLOCK_NUMBERS // max(1, x_LsGTC[:1].numel()))
        memory = x_LsGTC.new_empty(x_LsGTC[:step].shape)
        for part in x_LsGTC.split(step):
            yield _explicit(memory[: len(part)].copy_(part))


def _taps(windows: LaidWindows) -> slice:
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
    if n == 0:
        return None
    spoilt = None if shown.z_LSU is shown.a_LSU else z_GuLS.sum(dtype=_wide(z_GuLS))
    if spoilt is not None and not bulk.in_bulk(spoilt) and not bool(spoilt.isfinite()):
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
    square_Gu = _sums(rest_GuLS.square())
    if spoilt is not None and bulk.in_bulk(spoilt):
        # NaN where z is not finite: a GPU is waited for once, in `sound`
        square_Gu += 0 * spoilt
    return _Left(rows_GMLS.flatten(2), about_Gu, _sums(rest_GuLS), square_Gu, fired_Gu, kept_P)


def _native(
    z_GuLS: torch.Tensor | None, a_GuLS: torch.Tensor, kept_P: torch.Tensor | None, *, fired: bool
) -> _Left | None:
    """The same by the native kernel."""
    units = a_GuLS.shape[1]
    numbers = (units * (1 + fired) + 1) * a_GuLS[:, 0].numel()
    rows_GMLS = _beside(a_GuLS, rows=units * (1 + fired) + 1, memory=SCRATCH.of("left", numbers))
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
    if value_GuLS.stride(1) != 1 or bulk.in_bulk(value_GuLS):
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


SCRATCH = _Scratch()


def _about(a_GuLS: torch.Tensor, n: int) -> torch.Tensor:
    """A number near each unit's mean; of equal values that value itself, so that nothing is left of them."""
    mean_Gu = (_sums(a_GuLS) / n).to(_wide(a_GuLS))
    first_Gu = a_GuLS[..., 0, 0].to(mean_Gu.dtype)
    # a sum of equal float32 values may be off by more than their last bit
    return torch.where((first_Gu - mean_Gu).abs() <= 2.0**-12 * mean_Gu.abs(), first_Gu, mean_Gu)


def _right(shown: Presentations, start: int, stop: int, kept_P: torch.Tensor | None) -> _Right:
    if shown.windows is not None and kept_P is None:
        windows = shown.windows(start, stop).laid()
        return _Right(windows, windows.square_G, None, windows.far_G)
    x_GPD = as_float(shown.patches(start, stop)).flatten(0, 1).transpose(0, 1)
    x_GPD = x_GPD if kept_P is None else x_GPD[:, kept_P]
    if x_GPD.shape[1] and native_deviations.takes(x_GPD):
        rest_GPD = SCRATCH.of("right", x_GPD.numel()).view(x_GPD.transpose(0, 1).shape).transpose(0, 1)
        inputs, rest = (one.transpose(1, 2)[:, :, None] for one in (x_GPD, rest_GPD))
        found = native_deviations.deviations(None, inputs, rest, None)
        if found is not None:
            square_G = found.square_Gu.sum(1)
            return _Right(rest_GPD, square_G, found.about_Gu, torch.zeros_like(square_G))
    about_GD = _about(x_GPD.transpose(1, 2)[..., None], x_GPD.shape[1])
    rest_GPD = (x_GPD.transpose(0, 1) - about_GD).transpose(0, 1)
    square_G = torch.linalg.vector_norm(rest_GPD, dim=-1).square().sum(1)
    return _Right(rest_GPD, square_G, about_GD, torch.zeros_like(square_G))
