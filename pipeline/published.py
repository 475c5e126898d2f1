"""The files of committed runs as DuckDB sees them: read-only, of known size, and safe to read from several threads.

Layer 1: beside filesystems.py the only file that imports fsspec, as DuckDB takes a file system of no other kind. DuckDB
shares one open file between threads and calls `seek` and then `read` on it; with fsspec's own files two threads that
interleave read each other's bytes, so the position here is each thread's own. Objects never change and the manifests
say how long they are: nothing is asked of the store but the bytes, and of a bucket no bytes twice while they fit in
memory (DuckDB's own cache leaves out file systems of this kind).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

import fsspec

from pipeline.filesystems import filesystem
from pipeline.store import Store

PROTOCOL = "census"
# of a bucket: a column of 10 million rows takes 80 MB; of a directory, which the system keeps: footers
KEPT_BYTES, KEPT_FOOTER_BYTES = 1 << 30, 64 << 20
# what DuckDB reads first of a file of up to 16 MB: its end
FIRST_READ_BYTES = 16 << 10
# the first reads of a file are of its end: the footer of 124 documented columns takes 100 kB
TAIL_BYTES = 128 << 10


class Piece(NamedTuple):
    """A part of an object: the bytes from `start` on."""

    start: int
    content: bytes

    def part(self, start: int, end: int) -> bytes | None:
        """The bytes from `start` to `end`; None if they are not all here."""
        inside = self.start <= start and end <= self.start + len(self.content)
        return self.content[start - self.start : end - self.start] if inside else None


Known = Callable[[str], Sequence[Piece]]


class _Kept:
    """What has been read last, by object and range, up to a number of bytes; for several threads."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._bytes = 0
        self._ranges: OrderedDict[tuple[str, int, int], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[str, int, int]) -> bytes | None:
        with self._lock:
            if key in self._ranges:
                self._ranges.move_to_end(key)
            return self._ranges.get(key)

    def put(self, key: tuple[str, int, int], content: bytes) -> None:
        with self._lock:
            if len(content) > self._limit or key in self._ranges:
                return
            self._ranges[key] = content
            self._bytes += len(content)
            while self._bytes > self._limit:
                self._bytes -= len(self._ranges.popitem(last=False)[1])


class _Position(threading.local):
    offset = 0


@dataclass(frozen=True)
class _Reading:
    """One object, open for reading; a read is one range request at most."""

    read_range: Callable[[int, int], bytes]
    position: _Position = field(default_factory=_Position)

    def seek(self, offset: int) -> int:
        self.position.offset = offset
        return offset

    def tell(self) -> int:
        return self.position.offset

    def read(self, count: int) -> bytes:
        start = self.position.offset
        content = self.read_range(start, start + count)
        self.position.offset = start + len(content)
        return content

    def close(self) -> None:
        """Nothing is held open between reads."""


class PublishedFiles(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """A file system of the given objects of a store (key → bytes) and nothing else, under census://.

    `known` gives the pieces of an object that need not be read.
    """

    protocol = PROTOCOL
    cachable = False

    def __init__(self, store: Store, sizes: Mapping[str, int], known: Known = lambda _: ()) -> None:
        super().__init__()
        self._files, self._root = filesystem(store.url)
        self._sizes = dict(sizes)
        self._known = known
        self._kept = _Kept(KEPT_BYTES if "://" in store.url else KEPT_FOOTER_BYTES)
        self._is_bucket = "://" in store.url

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
        """The same time always: an object never changes."""
        return datetime.fromtimestamp(0, UTC)

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> _Reading:
        if mode != "rb":
            raise PermissionError(f"{path}: tables of committed runs are read-only")
        key = self.info(path)["name"]
        return _Reading(lambda start, end: self._range(key, start, min(end, self._sizes[key])))

    def _range(self, key: str, start: int, end: int) -> bytes:
        for piece in self._known(key):
            if (content := piece.part(start, end)) is not None:
                return content
        first = max(0, self._sizes[key] - TAIL_BYTES)
        if first <= start:
            tail = Piece(first, self._kept_or_read(key, first, self._sizes[key]))
            return tail.part(start, end) or b""
        if self._is_bucket:
            return self._kept_or_read(key, start, end)
        return self._read(key, start, end)

    def _kept_or_read(self, key: str, start: int, end: int) -> bytes:
        content = self._kept.get((key, start, end))
        if content is None:
            content = self._read(key, start, end)
            self._kept.put((key, start, end), content)
        return content

    def _read(self, key: str, start: int, end: int) -> bytes:
        # a byte more than there should be shows that the object has grown
        beyond = int(end == self._sizes[key])
        content: bytes = self._files.cat_file(f"{self._root}/{key}", start=start, end=end + beyond)
        if len(content) != end - start:
            raise OSError(f"{key} has not the {self._sizes[key]} bytes that were committed")
        return content
