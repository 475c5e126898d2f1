"""A state object that is too large to be held whole: the part of it that is of some sites, and the hash of all of it.

Layer 1: pure. Tensors lie in the object one after the other, so that those of a few sites are a few ranges of bytes;
what is cut out is a state object again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipeline.cells import SEPARATOR, damaged

# the first read of an object: more than what says where the tensors of 300 sites are
HEADER_BYTES = 256 << 10
# what is held at once of an object that is hashed
HASHED_BYTES = 16 << 20

# the bytes of an object from one place to another, fewer where it ends before
Read = Callable[[int, int], bytes]


class _Tensor(NamedTuple):
    """Where the bytes of a tensor are, behind the header, and what is said of it."""

    first: int
    last: int
    name: str
    said: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class CellParts:
    """Where everything is in a state object: its `tensors` from byte `start` on, in order of their places."""

    key: str
    read: Read
    start: int
    metadata: Mapping[str, str]
    tensors: Sequence[_Tensor]

    @classmethod
    def opened(cls, read: Read, *, key: str) -> CellParts:
        """Read what says where the tensors are; SpoiltObject if it is damaged."""
        head = read(0, HEADER_BYTES)
        start = 8 + int.from_bytes(head[:8], "little")
        head += read(len(head), start) if start > len(head) else b""
        try:
            header: dict[str, Any] = json.loads(head[8:start])
            metadata = header.pop("__metadata__")
            places = {name: said["data_offsets"] for name, said in header.items()}
            found = [_Tensor(places[name][0], places[name][1], name, said) for name, said in header.items()]
            return cls(key, read, start, metadata, sorted(found, key=lambda one: one[:3]))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise damaged(key, error) from error

    def of(self, sites: Collection[str]) -> bytes:
        """The state object with the states of these sites alone; those of all others are empty in it."""
        kept = [one for one in self.tensors if one.name == SEPARATOR or one.name.rsplit(SEPARATOR, 1)[0] in sites]
        header: dict[str, Any] = {"__metadata__": self.metadata}
        ranges: list[tuple[int, int]] = []
        size = 0
        for one in kept:
            header[one.name] = {**one.said, "data_offsets": [size, size + one.last - one.first]}
            size += one.last - one.first
            if ranges and ranges[-1][1] == one.first:
                ranges[-1] = (ranges[-1][0], one.last)
            else:
                ranges.append((one.first, one.last))
        said = json.dumps(header).encode()
        said += b" " * (-len(said) % 8)
        tensors = [self.read(self.start + first, self.start + last) for first, last in ranges if first < last]
        return b"".join([len(said).to_bytes(8, "little"), said, *tensors])

    @property
    def bytes(self) -> int:
        """Bytes of the whole object."""
        return self.start + max((one.last for one in self.tensors), default=0)

    def sha256(self) -> str:
        """SHA-256 of the whole object, read a part after the other; SpoiltObject if it has another length."""
        hashed, done = hashlib.sha256(), 0
        while done < self.bytes:
            # one byte more than there should be at the end
            content = self.read(done, min(done + HASHED_BYTES, self.bytes + 1))
            if not content:
                break
            hashed.update(content)
            done += len(content)
        if done != self.bytes:
            raise damaged(self.key, ValueError(f"{done} bytes read, {self.bytes} expected"))
        return hashed.hexdigest()
