"""How a run says where it is: the contract, and one that says nothing.

Layer 1: imports nothing of the pipeline.
"""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told of stages and their steps; it may show them, it never decides anything."""

    def stage(self, name: str, total: int, done: int) -> None:
        """A stage begins: `total` units of work in it, of which `done` need no work."""
        ...

    def advance(self, count: int) -> None:
        """`count` more units of the current stage are done."""
        ...

    def note(self, text: str) -> None:
        """Something that a person should read now."""
        ...


class Silent:
    """Shows nothing."""

    def stage(self, name: str, total: int, done: int) -> None:
        """Ignore."""

    def advance(self, count: int) -> None:
        """Ignore."""

    def note(self, text: str) -> None:
        """Ignore."""
