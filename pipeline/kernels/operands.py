"""Both sides of a slice's products: what is known of them, and that they can be multiplied.

Layer 1: pure torch, no I/O. Shapes as in `pooled.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch

# Σ of squared means over Σ of variances of the inputs up to which x need not be centred
FAR = 8.0
# sums of squares beyond 2^±60 are left to the reference: their products leave float32's range
LARGEST = 2.0**60


class LeftSums(NamedTuple):
    """Of the left side, a − about and whether it fires − rate: sums over the n presentations of a slice.

    `fired_Gu` and `rate_Gu` are None where firing is not asked for; `still_Gu` says of which units nothing is left.
    """

    n: int
    about_Gu: torch.Tensor
    rest_Gu: torch.Tensor
    square_Gu: torch.Tensor
    fired_Gu: torch.Tensor | None
    rate_Gu: torch.Tensor | None
    still_Gu: torch.Tensor


class RightSums(NamedTuple):
    """Of the right side, x − about: Σ of its squares, and about n‖x̄‖², by group.

    `about_GD` is None where it is 0; `taps` is how many taps come before the channels in D, None where D is as that of
    the patterns.
    """

    about_GD: torch.Tensor | None
    square_G: torch.Tensor
    far_G: torch.Tensor
    taps: int | None


class Operands(ABC):
    """Both sides of a slice."""

    left: LeftSums
    right: RightSums

    @abstractmethod
    def add_to(self, product_GMD: torch.Tensor) -> torch.Tensor:
        """Add the products to a matrix of rows (a − about, firing − rate, one more); Σ(x − about), float64 (G, D)."""

    def sound(self) -> bool:
        """Whether products keep their digits: all finite, of usual size, x not far from 0 for its spread."""
        left, right = self.left, self.right
        usual_Gu = (left.square_Gu >= 1 / LARGEST) & (left.square_Gu <= LARGEST) | left.still_Gu
        near_G = (1 + FAR) * right.far_G <= FAR * right.square_G
        near_G &= (right.square_G <= LARGEST) & (right.square_G >= 1 / LARGEST)
        return bool(usual_Gu.all() & near_G.all())
