"""Marks by which a run knows that a gc is at work, so that it commits nothing that is being removed.

Layer 1. A gc makes a mark, looks at what runs claim, and removes for LOOK_S what none does; then it puts a new mark in
the place of the old one and looks again. A run claims first. Before it commits it waits until the marks that are there
are gone, and only then lists what it is about to name. So nothing of it is removed after that listing: whoever made a
mark before has ended what it does by that look, and whoever makes one later sees the claims. It does not depend on how
long anything takes, but for one thing: a mark older than DEAD is taken for that of a gc which was killed.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

from pipeline.errors import StoreError, Unfinished
from pipeline.store import Store

PREFIX = "gc-"
# a look costs a gc one listing of the names of runs; a run that commits meanwhile waits for as long
LOOK_S = 5.0
# a gc may have to repeat a request to a store that does not answer
WAIT_S = 120.0
POLL_S = 0.5
# no request is on its way for that long
DEAD = timedelta(hours=1)


class Mark:
    """That a gc is at work: in the store from before each of its looks until after the last removal by it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._key: str | None = None
        self._made_s = 0.0

    def renew(self) -> bool:
        """Make a new mark unless there is one younger than LOOK_S; whether it was made, so that a look is due."""
        # the time of day goes on while a machine sleeps
        now_s = time.time()
        if self._key is not None and 0 <= now_s - self._made_s < LOOK_S:
            return False
        key = f"{PREFIX}{uuid.uuid4().hex}"
        self._store.put_once(key, b"at work")
        if self._key is not None:
            self._store.remove(self._key)
        self._key, self._made_s = key, now_s
        return True

    def clear(self) -> None:
        """Remove the mark: nothing more is removed. One that cannot be removed is taken for dead later."""
        if self._key is not None:
            with suppress(StoreError):
                self._store.remove(self._key)
            self._key = None


def await_looks(store: Store, note: Callable[[str], None]) -> None:
    """Return once every gc that is at work has looked at the claims since this call; Unfinished if one does not."""
    made = store.modified(PREFIX)
    if not made:
        return
    now = store.now()
    waiting = {key for key, when in made.items() if now - when < DEAD}
    if waiting:
        note("waiting for a gc that is at work in this store")
    end_s = time.monotonic() + WAIT_S
    while waiting:
        waiting &= store.modified(PREFIX).keys()
        if not waiting:
            break
        if time.monotonic() >= end_s:
            raise Unfinished(
                f"{store.url}: a gc is at work there and does not go on; the same command goes on once it has ended. "
                f"If it was killed, remove {min(waiting)}, or wait until that is an hour old"
            )
        time.sleep(POLL_S)
