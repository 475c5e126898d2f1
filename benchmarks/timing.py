"""Times several pieces of work by turns in one process, so that whatever slows the machine down slows all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles

import torch

# takes the number of the round, so that all do the same work in the same round
Work = Callable[[int], object]


@dataclass(frozen=True)
class Passes:
    """Seconds of each round's pass: of the clock, and of the processor over all threads."""

    wall: tuple[float, ...]
    cpu: tuple[float, ...]

    def with_share(self, share: float, full: Passes) -> Passes:
        """Passes of which a share does what those of `full` do beside."""
        wall, cpu = (
            tuple(one + share * (other - one) for one, other in zip(*each, strict=True))
            for each in ((self.wall, full.wall), (self.cpu, full.cpu))
        )
        return Passes(wall, cpu)


@dataclass(frozen=True)
class Ratio:
    """Ratio of medians, with the quartiles of the ratios of each round; `cpu` is the same of the processor's time."""

    wall: float
    low: float
    high: float
    cpu: float


def settled() -> None:
    """Wait for what a GPU has been asked for."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def interleaved(works: Mapping[str, Work], *, seconds: float, rounds: int) -> dict[str, Passes]:
    """One pass of each in every round, at least `rounds` rounds and as many as fit in so many seconds.

    Each begins every round equally often, and one round before is not counted. A GPU has done what a pass asked for.
    """
    names = list(works)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for name in names:
        works[name](0)
    begin, number = time.perf_counter(), 0
    while number < rounds or time.perf_counter() - begin < seconds:
        number += 1
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            settled()
            wall, cpu = time.perf_counter(), time.process_time()
            works[name](number)
            settled()
            found[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {name: Passes(*zip(*passes, strict=True)) for name, passes in found.items()}


def ratio(passes: Passes, reference: Passes) -> Ratio:
    """How much longer the passes take than the reference's."""
    each = [one / other for one, other in zip(passes.wall, reference.wall, strict=True)]
    low, _, high = quantiles(each, n=4, method="inclusive")
    wall, cpu = (median(one) / median(other) for one, other in zip(_both(passes), _both(reference), strict=True))
    return Ratio(wall, low, high, cpu)


def _both(passes: Passes) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return passes.wall, passes.cpu
