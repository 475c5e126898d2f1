"""The pool of resident workers: those that died are replaced.

Layer 5.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import ray

from pipeline.cluster.reason import last_line
from pipeline.cluster.workers import described
from pipeline.errors import StoreError

# a cluster that scales up takes minutes to give the first worker
START_TIMEOUT_S = 600.0
# a node that is there has started one by then
NOTE_AFTER_S = 30.0


class Pool:
    """As many workers as were asked for: those that died are replaced, and a new one counts once it has answered."""

    def __init__(
        self,
        start: Callable[[], Any],
        lacking: Callable[[], str | None],
        *,
        size: int,
        retries: int,
        note: Callable[[str], None],
    ) -> None:
        self.size = size
        self.idle: list[Any] = []
        self._start = start
        self._lacking = lacking
        self._note = note
        self._has_noted = False
        self._retries = retries
        self._failures = 0
        self._starting: dict[Future[Any], Any] = {}
        self._busy: set[Any] = set()
        self._alone_since = time.monotonic()

    def fill(self) -> None:
        """Start workers in place of those that are gone."""
        for _ in range(self.size - len(self.idle) - len(self._busy) - len(self._starting)):
            worker = self._start()
            self._starting[worker.ready.remote().future()] = worker

    @property
    def starting(self) -> list[Future[Any]]:
        """What is done as soon as one of the new workers is ready, or cannot be."""
        return list(self._starting)

    def admit(self) -> None:
        """Count in the new workers that have answered. StoreError if none comes to life."""
        for future in [future for future in self._starting if future.done()]:
            worker = self._starting.pop(future)
            error = future.exception()
            if error is None:
                self.idle.append(worker)
                self._failures = 0
                continue
            self._failures += 1
            if self._failures > self._retries:
                raise StoreError(f"Ray cannot start a worker: {last_line(error)}") from error
        if self.idle or self._busy:
            self._alone_since = time.monotonic()
        else:
            self._wait(time.monotonic() - self._alone_since)

    def _wait(self, alone_s: float) -> None:
        """Say once, early, if no node that is there could hold a worker: another may come. StoreError in the end."""
        if alone_s > START_TIMEOUT_S:
            lacking = self._lacking()
            raise StoreError(
                f"no worker started within {START_TIMEOUT_S:.0f} s: the cluster has "
                f"{described(ray.cluster_resources())}, of which {described(ray.available_resources())} are free"
                f"{f'; {lacking}' if lacking else ''}; ask for less under [resources], or wait"
            )
        if alone_s > NOTE_AFTER_S and not self._has_noted and (lacking := self._lacking()):
            self._has_noted = True
            self._note(f"{lacking}: waiting for one that has it, {START_TIMEOUT_S:.0f} s in all")

    def take(self) -> Any:
        """An idle worker, busy from now on."""
        worker = self.idle.pop()
        self._busy.add(worker)
        return worker

    def give_back(self, worker: Any) -> None:
        """The worker has answered."""
        self._busy.remove(worker)
        self.idle.append(worker)

    def rest(self) -> None:
        """Have the idle workers give back the memory that calls have kept; what they are handed next waits for it."""
        for worker in self.idle:
            worker.rest.remote()

    def drop(self, worker: Any) -> None:
        """The worker is dead, or is to be."""
        # a map that is left by an exception ends when that is forgotten, which may be behind the pool and Ray
        if worker in self._busy:
            self._busy.remove(worker)
            ray.kill(worker)

    def close(self) -> None:
        """Kill every worker, whatever it is at."""
        for worker in [*self.idle, *self._busy, *self._starting.values()]:
            ray.kill(worker)
        self.idle.clear()
        self._busy.clear()
        self._starting.clear()
