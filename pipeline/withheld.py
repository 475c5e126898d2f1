"""A store that keeps what it is given to itself until nothing can be refused any more.

Layer 1. What resolving a job finds out at some expense, values of columns and hashes of files, is worth storing, and a
job that is refused must leave nothing behind.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import TypeVar

from pipeline.store import MissingObject, Store, Stored

T = TypeVar("T")


class Withheld(Store):
    """The store below as it will be once what was written here is released: for reading and writing alike."""

    def __init__(self, below: Store) -> None:
        super().__init__(below.url)
        self._below = below
        self._written: dict[str, bytes] = {}
        self._removed: set[str] = set()

    def release(self) -> None:
        """Write to the store below, and then remove there, what was written and removed here since the last time."""
        for key, content in self._written.items():
            self._below.put_once(key, content)
        for key in self._removed - self._written.keys():
            self._below.remove(key)
        self._written, self._removed = {}, set()

    def _persist(self, action: str, key: str, attempt: Callable[[], T]) -> T:
        # the store below tries again by itself
        return attempt()

    def _create(self, key: str, content: bytes) -> bool:
        if key in self._list(key):
            return False
        self._written[key] = content
        return True

    def _read(self, key: str) -> bytes:
        if key in self._written:
            return self._written[key]
        if key in self._removed:
            raise MissingObject(f"{self.url}: {key} was removed")
        return self._below.get(key)

    def _list(self, prefix: str) -> dict[str, Stored]:
        there = {key: stored for key, stored in self._below.listing(prefix).items() if key not in self._removed}
        now = datetime.now(UTC)
        here = {key: Stored(now, len(content)) for key, content in self._written.items() if key.startswith(prefix)}
        return here | there

    def _delete(self, key: str) -> None:
        self._written.pop(key, None)
        self._removed.add(key)
