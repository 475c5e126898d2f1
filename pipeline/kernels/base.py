"""The contract of a primitive: a mergeable state of what one site was shown, and the plain-torch way to compute it.

Layer 1: pure torch, no I/O. A primitive is a frozen dataclass, so equal requests of two statistics are one computation.
Its `observe` is the reference: a fused kernel may compute several primitives in one pass and must give the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from pipeline.sites import Presentations, Site

# A state is a flat mapping of named tensors; counts are int64, sums float64.
State = dict[str, torch.Tensor]


class Primitive(ABC):
    """One mergeable quantity: (empty, merge) is a commutative monoid up to the tolerance of its float64 sums.

    Concrete primitives are `@dataclass(frozen=True)`; their fields are the parameters that change the result.
    """

    @abstractmethod
    def empty(self, site: Site) -> State:
        """The state of no presentations: extremes at ±inf, counts and sums 0."""

    @abstractmethod
    def observe(self, presentations: Presentations) -> State:
        """The state of one batch, on the device of the batch."""

    @abstractmethod
    def merge(self, left: State, right: State) -> State:
        """The state of both, without changing either; exact for integers, extremes and heaps."""

    def forms(self, site: Site) -> tuple[State, ...]:
        """States of no presentations in each shape that values may bring a state to, `empty` first."""
        return (self.empty(site),)

    def state_bytes(self, site: Site) -> int:
        """Bytes of the state of this site, which is not made: it may be larger than any memory."""
        with torch.device("meta"):
            return sum(value.numel() * value.element_size() for value in self.empty(site).values())
