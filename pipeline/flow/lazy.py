"""How a tensor that may never be asked for is made of those that the forward made.

Layer 1. Each is called for its tensor; what it is made of stands in its fields, so that the same can be made of the
tensors of another forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from pipeline.flow.gains import Moments, before_gain
from pipeline.flow.values import Call

Lazy = Callable[[], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Same:
    """A tensor as the forward made it."""

    tensor: torch.Tensor

    def __call__(self) -> torch.Tensor:
        """The tensor itself."""
        return self.tensor


@dataclass(frozen=True, eq=False)
class Viewed:
    """What a view of the model makes of `source`; `part` of its results where it has several."""

    call: Call
    source: Lazy
    part: int | None

    def __call__(self) -> torch.Tensor:
        """The view, anew at every call."""
        out = self.call.func(self.source(), *self.call.args[1:], **self.call.kwargs)
        return out if self.part is None else out[self.part]  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False)
class Normed:
    """What a norm's operation gives without its gain and bias, made once.

    moments  of a layer norm, where its operation was asked for them
    """

    call: Call
    moments: Moments | None = None

    def __call__(self) -> torch.Tensor:
        """The norm's input, normalised."""
        return self._made

    @property
    def x(self) -> torch.Tensor:
        """The norm's input."""
        return self.call.args[0]  # type: ignore[no-any-return]

    @cached_property
    def _made(self) -> torch.Tensor:
        return before_gain(self.call)
