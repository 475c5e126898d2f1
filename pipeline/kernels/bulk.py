"""How much is done at once on a GPU, where a launch costs more than most of the numbers that it is about.

Layer 1: pure torch, no I/O. On a CPU slices are as large as its caches; a GPU would wait for Python at each. Shapes: G
groups, M and D rows and columns of a product, P presentations.
"""

from __future__ import annotations

import torch

from pipeline.devices import CPU

# numbers of a slice, and of the products of its parts: 128 MiB of float32 each
NUMBERS = 1 << 25
# values of z in a block of the reference kernel, 64 MiB of float64
VALUES = 1 << 23
# presentations of a slice: float32 counts them exactly
PRESENTATIONS = 1 << 20
# presentations of one product: equal terms are all rounded to the same side, and a sum loses more with each
LONGEST = 512


def in_bulk(value: torch.Tensor) -> bool:
    """Whether a tensor lies where much is done at once."""
    return value.device.type != CPU


def multiply(left_GMP: torch.Tensor, right_GPD: torch.Tensor) -> torch.Tensor:
    """Σ over the presentations of left × right, float64 (G, M, D), of any strides.

    Products of `LONGEST` presentations each, in the precision of the operands, added up in float64.
    """
    groups, rows, presentations = left_GMP.shape
    inputs = right_GPD.shape[2]
    parts = presentations // LONGEST
    at_once = max(1, NUMBERS // max(1, groups * rows * inputs))
    sum_GMD = left_GMP.new_zeros((groups, rows, inputs), dtype=torch.float64)
    for first in range(0, parts, at_once):
        run = slice(first * LONGEST, min(first + at_once, parts) * LONGEST)
        left_GBMp = left_GMP[..., run].unflatten(2, (-1, LONGEST)).transpose(1, 2)
        sum_GMD += (left_GBMp @ right_GPD[:, run].unflatten(1, (-1, LONGEST))).sum(1, dtype=torch.float64)
    if parts * LONGEST < presentations:
        sum_GMD += left_GMP[..., parts * LONGEST :] @ right_GPD[:, parts * LONGEST :]
    return sum_GMD
