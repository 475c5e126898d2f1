"""How long a task was at what.

Layer 0: imports nothing of the pipeline.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class Stopwatch:
    """Seconds of the clock by what they were spent on; parts do not overlap."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    @contextmanager
    def on(self, part: str) -> Iterator[None]:
        """Count the block's seconds for a part."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.spent[part] = self.spent.get(part, 0.0) + time.perf_counter() - start

    def over(self, part: str, values: Iterable[T]) -> Iterator[T]:
        """The same values; the seconds that each is waited for count for a part."""
        waiting = iter(values)
        while True:
            with self.on(part):
                try:
                    value = next(waiting)
                except StopIteration:
                    return
            yield value
