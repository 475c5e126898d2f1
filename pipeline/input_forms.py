"""The forms in which kernels are given the inputs of presentations: their sums, and windows that nobody copied.

Layer 1: pure torch, no I/O. Shapes as in `sites.py`; l entries of L, C channels, T taps of a window.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class InputSums:
    """Per presentation and group, in float64: what match needs of x, shared by every unit of the group.

    sum_LSG     Σx
    square_LSG  Σx²
    centred_LSG Σ(x − x̄)², computed around the entry's own mean so that a large mean does not cancel it
    lengths     what `kernels.match.lengths_of` makes of them, once it was asked
    by_group    the same of the native kernel, where a batch has all presentations in their order
    laid_3P     all three one behind the other in one memory, where there is one group and they were made so
    """

    def __init__(
        self,
        sum_LSG: torch.Tensor,
        square_LSG: torch.Tensor,
        centred_LSG: torch.Tensor,
        *,
        laid_3P: torch.Tensor | None = None,
    ) -> None:
        self.sum_LSG = sum_LSG
        self.square_LSG = square_LSG
        self.centred_LSG = centred_LSG
        self.lengths: tuple[torch.Tensor, ...] | None = None
        self.by_group: tuple[torch.Tensor, ...] | None = None
        self.laid_3P = laid_3P


class LaidWindows(NamedTuple):
    """x of some entries as a view that repeats its memory, T taps of the window before C channels, float32 at least.

    x_LsGTC   (l, *positions, G, *taps, C); D in the order of `site.pattern_UD` is (channel, tap)
    square_G  Σx² over all presentations
    far_G     about Σx̄² of the D inputs, times presentations: how far x is from 0
    """

    x_LsGTC: torch.Tensor
    square_G: torch.Tensor
    far_G: torch.Tensor


class WindowShape(NamedTuple):
    """How windows lie in their input, by axis; zeros around it (before, after)."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]


class Windows(NamedTuple):
    """x of some entries of a convolution, uncopied.

    x_LCs  (l, C, *spatial), channels in the order of the groups
    shape  how its windows lie
    lay    gives the same with the channels side by side
    """

    x_LCs: torch.Tensor
    shape: WindowShape
    lay: Callable[[torch.Tensor], LaidWindows]

    def laid(self) -> LaidWindows:
        """See `lay`."""
        return self.lay(self.x_LCs)
