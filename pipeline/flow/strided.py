"""Chains of views as one: a size, strides and an offset in the memory of what they are views of.

Layer 1: pure torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Strided:
    """A view of any tensor of one size and strides; `offset` from where that begins."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The view."""
        return tensor.as_strided(self.size, self.stride, tensor.storage_offset() + self.offset)


def strided(view: torch.Tensor, source: torch.Tensor) -> Strided | None:
    """How `view` is had of `source`; None where it is no view of it, or empty."""
    if view.numel() == 0 or view.dtype != source.dtype or view.is_conj() or view.is_neg():
        return None
    if view.untyped_storage().data_ptr() != source.untyped_storage().data_ptr():
        return None
    return Strided(tuple(view.shape), view.stride(), int(view.storage_offset() - source.storage_offset()))


class Learned:
    """A function that makes the same view of every tensor of one size and strides: asked once, then known.

    Where what it makes is no view, it is asked every time.
    """

    def __init__(self, make: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._make = make
        self._of: tuple[torch.Size, tuple[int, ...]] | None = None
        self._view: Strided | None = None
        self._is_same = False

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """What the function makes of a tensor."""
        if self._view is not None and self._of == (tensor.shape, tensor.stride()):
            return tensor if self._is_same else self._view.of(tensor)
        made = self._make(tensor)
        self._of, self._view = (tensor.shape, tensor.stride()), strided(made, tensor)
        self._is_same = made is tensor
        return made
