"""Counts of which a state holds many: a histogram has two hundred for each unit, and half the bytes are enough.

Layer 1: pure torch. An array of counts is int32 as long as none of them is larger than that holds, and int64 from then
on: which of the two is decided by its numbers alone, so that equal counts are equal bytes whatever they were added up
from. Nothing is ever rounded or cut off.
"""

from __future__ import annotations

import torch

NARROW = torch.int32
LARGEST = torch.iinfo(NARROW).max


def narrowed(count: torch.Tensor) -> torch.Tensor:
    """Counts of either type in the type that they belong in, in memory of their own.

    >>> narrowed(torch.tensor([3, 2**31 - 1])).dtype, narrowed(torch.tensor([3, 2**31])).dtype
    (torch.int32, torch.int64)
    """
    fits = count.numel() == 0 or int(count.max()) <= LARGEST
    return count.to(NARROW if fits else torch.int64, copy=True, memory_format=torch.contiguous_format)


def added(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The sums of counts, exactly."""
    narrow = left.dtype == right.dtype == NARROW
    if narrow and (left.numel() == 0 or int(left.max()) + int(right.max()) <= LARGEST):
        return left + right
    return narrowed(left.long() + right)
