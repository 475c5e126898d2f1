"""What a tap keeps beside the values of a running forward.

Layer 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from pipeline.flow.lazy import Lazy
from pipeline.flow.present import Met
from pipeline.flow.watch import Watch


@dataclass(eq=False)
class Pending:
    """A site whose affine map has run and whose z is still to come, `step` operations along its trail.

    `x` is what the trail has made of the call's input so far, `before` what its gate overwrites, `noted` where the root
    is noted, `other` an operation that was told otherwise than in the probe.
    """

    met: Met
    step: int
    x: Lazy
    root: Pending | None = None
    before: torch.Tensor | None = None
    noted: list[Notes] = field(default_factory=list)
    other: str | None = None

    def forget(self) -> None:
        """Take the root out of all notes: a value whose notes lead back to its tensor would outlive the forward."""
        for notes in self.noted:
            notes.pending = [one for one in notes.pending if one is not self and one.root is not self]
        self.noted.clear()


@dataclass(eq=False)
class Notes:
    """What the tap keeps beside a value: the sites that wait for it, how to have it before a norm's gain, of the keys
    `gain`, and what watches it."""

    pending: list[Pending]
    before_gain: Lazy | None = None
    gain: frozenset[int] = frozenset()
    watches: list[Watch] = field(default_factory=list)

    def __post_init__(self) -> None:
        for one in self.pending:
            (one.root or one).noted.append(self)

    def add(self, pending: Pending) -> None:
        """Let one more site wait for the value."""
        self.pending.append(pending)
        (pending.root or pending).noted.append(self)
