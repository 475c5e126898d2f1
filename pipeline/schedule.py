"""Which task goes out next, and what happens to one that comes to nothing: bookkeeping for executors of many workers.

Layer 1: knows nothing of tasks but their numbers, and nothing of workers.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable

# with nothing left to hand out, a task that takes this many times the median of the others goes to a second worker
STRAGGLER_FACTOR = 3.0
STRAGGLER_MIN_S = 10.0


class Schedule:
    """Tasks 0 … count-1, each open until its first answer, or until more than `retries` tries came to nothing."""

    def __init__(self, count: int, *, retries: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._waiting = deque(range(count))
        self._open = set(range(count))
        self._retries = retries
        self._clock = clock
        self._failures = [0] * count
        self._since: dict[int, list[float]] = {}
        self._seconds: list[float] = []

    @property
    def finished(self) -> bool:
        """Whether no task is open."""
        return not self._open

    def take(self) -> int | None:
        """The task that an idle worker gets, in flight from now on; None if there is nothing for it to do."""
        number = self._waiting.popleft() if self._waiting else self._straggler()
        if number is not None:
            self._since.setdefault(number, []).append(self._clock())
        return number

    def answered(self, number: int) -> bool:
        """Close a task; False if it was closed before, by a second worker's answer."""
        since = self._since[number].pop(0)
        if number not in self._open:
            return False
        self._seconds.append(self._clock() - since)
        self._open.remove(number)
        return True

    def came_to_nothing(self, number: int) -> int | None:
        """Have a task tried again; the number of tries if it is closed now because that was the last one."""
        self._since[number].pop(0)
        if number not in self._open or self._since[number]:
            return None
        self._failures[number] += 1
        if self._failures[number] > self._retries:
            self._open.remove(number)
            return self._failures[number]
        self._waiting.append(number)
        return None

    def _straggler(self) -> int | None:
        """The task that has been in flight for longest, at one worker only, if that is far longer than the others."""
        alone = [
            (since[0], number) for number, since in self._since.items() if number in self._open and len(since) == 1
        ]
        if not alone or not self._seconds:
            return None
        since, number = min(alone)
        limit = max(STRAGGLER_MIN_S, STRAGGLER_FACTOR * statistics.median(self._seconds))
        return number if self._clock() - since > limit else None
