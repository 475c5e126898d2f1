"""What runs over the batches of a site: the state of several primitives, grown batch by batch.

Layer 1: pure torch, no I/O. An accumulator holds what `merge(state, observe(batch))` would hold after every batch: the
same counts, extremes and choices, and float64 sums to rounding. `Reference` is just that; others do it in place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

from pipeline.kernels.base import Primitive, State
from pipeline.kernels.counts import LARGEST
from pipeline.kernels.reference import observe_all
from pipeline.sites import Presentations, Site


class Accumulator(ABC):
    """The running states of some primitives at one site."""

    @abstractmethod
    def add(self, presentations: Presentations) -> None:
        """Take one batch in."""

    @abstractmethod
    def states(self) -> Mapping[Primitive, State]:
        """The state of every primitive so far; changed by no later batch."""

    def remarks(self) -> list[str]:
        """What a person should know of how it was done."""
        return []

    @property
    def room(self) -> int:
        """Presentations that may be added by doing again, on a GPU, what `add` did there; 0 where that is not the same.

        It is where `add` reads and writes the same memory each time, and nothing of it waits for the GPU.
        """
        return 0

    @property
    def begun(self) -> tuple[int, ...]:
        """Another one once `add` has begun anew, in other memory."""
        return ()

    def count(self, presentations: int) -> None:  # noqa: B027
        """Note that so many were added in this way, no more than there is room for."""


class Reference(Accumulator):
    """States grown by the reference kernel."""

    def __init__(self, site: Site, primitives: Sequence[Primitive]) -> None:
        self._states = {primitive: primitive.empty(site) for primitive in primitives}
        self._seen = False

    def add(self, presentations: Presentations) -> None:
        """See `Accumulator`."""
        new = observe_all(list(self._states), presentations)
        for primitive, state in zip(list(self._states), new, strict=True):
            self._states[primitive] = primitive.merge(self._states[primitive], state) if self._seen else state
        self._seen = True

    def states(self) -> Mapping[Primitive, State]:
        """See `Accumulator`."""
        return dict(self._states)


class Bounded(Accumulator):
    """One whose counts are of 32 bits: begun anew before a count could outgrow them, and merged with what was before.

    grown  makes the accumulator, which counts nothing more than once at a presentation
    most   presentations that one of them is shown
    """

    def __init__(self, grown: Callable[[], Accumulator], *, most: int = LARGEST) -> None:
        self._grown = grown
        self._most = most
        self._now = grown()
        self._shown = 0
        self._renewed = 0
        self._before: Mapping[Primitive, State] | None = None

    def add(self, presentations: Presentations) -> None:
        """See `Accumulator`."""
        shown = presentations.entries * presentations.positions
        if self._shown and self._shown + shown > self._most:
            self._before, self._now, self._shown = self.states(), self._grown(), 0
            self._renewed += 1
        self._shown += shown
        self._now.add(presentations)

    @property
    def room(self) -> int:
        """See `Accumulator`."""
        return min(self._most - self._shown, self._now.room)

    @property
    def begun(self) -> tuple[int, ...]:
        """See `Accumulator`."""
        return (self._renewed, *self._now.begun)

    def count(self, presentations: int) -> None:
        """See `Accumulator`."""
        self._shown += presentations

    def states(self) -> Mapping[Primitive, State]:
        """See `Accumulator`."""
        now = self._now.states()
        if self._before is None:
            return now
        return {one: one.merge(before, now[one]) for one, before in self._before.items()}

    def remarks(self) -> list[str]:
        """See `Accumulator`."""
        return self._now.remarks()
