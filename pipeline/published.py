"""The files of committed runs as DuckDB sees them: read-only, of known size, and safe to read from several threads.

Layer 1: beside store.py the only file that imports fsspec, because DuckDB takes a file system of no other kind. DuckDB
shares one open file between threads and calls `seek` and then `read` on it; with fsspec's own files two threads that
interleave read each other's bytes, so the position here is each thread's own. Objects never change and the manifests
say how long they are: nothing is asked of the store but the bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import fsspec

from pipeline.store import Store, filesystem

PROTOCOL = "census"


class _Position(threading.local):
    offset = 0


@dataclass(frozen=True)
class _Reading:
    """One object, open for reading; every read is one range request."""

    files: Any
    path: str
    position: _Position = field(default_factory=_Position)

    def seek(self, offset: int) -> int:
        self.position.offset = offset
        return offset

    def tell(self) -> int:
        return self.position.offset

    def read(self, count: int) -> bytes:
        start = self.position.offset
        content: bytes = self.files.cat_file(self.path, start=start, end=start + count)
        self.position.offset = start + len(content)
        return content

    def close(self) -> None:
        """Nothing is held open between reads."""


class PublishedFiles(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """A file system of the given objects of a store (key → bytes) and nothing else, under census://."""

    protocol = PROTOCOL
    cachable = False

    def __init__(self, store: Store, sizes: Mapping[str, int]) -> None:
        super().__init__()
        self._files, self._root = filesystem(store.url)
        self._sizes = dict(sizes)

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        """Name and size of an object; FileNotFoundError for anything that is not published."""
        key = self._strip_protocol(path)
        if key not in self._sizes:
            raise FileNotFoundError(f"{key} is no table of a committed run")
        return {"name": key, "size": self._sizes[key], "type": "file"}

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        """The objects below a path."""
        folder = f"{self._strip_protocol(path)}/".lstrip("/")
        below = [self.info(key) for key in self._sizes if key.startswith(folder)]
        return below if detail else [entry["name"] for entry in below]

    def modified(self, path: str) -> datetime:
        """The same time always, so that what DuckDB has cached of an object stays valid."""
        return datetime.fromtimestamp(0, UTC)

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> _Reading:
        if mode != "rb":
            raise PermissionError(f"{path}: tables of committed runs are read-only")
        return _Reading(self._files, f"{self._root}/{self.info(path)['name']}")
