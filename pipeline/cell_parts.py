"""A state object that is too large to be held whole: the part of it that is of some sites or units, and its hash.

Layer 1: pure. Tensors lie in the object one after the other and row by row, so that those of a few sites, or their rows
of some units, are a few ranges of bytes; what is cut out is a state object again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from pipeline.cells import SEPARATOR, damaged

# the first read of an object: more than what says where the tensors of 300 sites are
HEADER_BYTES = 256 << 10
# what is held at once of an object that is hashed
HASHED_BYTES = 16 << 20
# what lies between two ranges and is read with them: a bucket takes as long to answer as to give some 100 kB
GAP_BYTES = 64 << 10

# the bytes of an object from one place to another, fewer where it ends before
Read = Callable[[int, int], bytes]


class Units(NamedTuple):
    """The units first…stop of a site of so many."""

    first: int
    stop: int
    units: int


class _Tensor(NamedTuple):
    """Where the bytes of a tensor are, behind the header, and what is said of it."""

    first: int
    last: int
    name: str
    shape: Sequence[int]
    dtype: str

    def rows_of(self, wanted: Units) -> _Tensor:
        """Its rows of some units; itself where it has not one for each."""
        if wanted.units == 1 or self.shape[:1] != [wanted.units]:
            return self
        row = (self.last - self.first) // wanted.units
        shape = [wanted.stop - wanted.first, *self.shape[1:]]
        return _Tensor(self.first + wanted.first * row, self.first + wanted.stop * row, self.name, shape, self.dtype)


@dataclass(frozen=True, eq=False)
class CellParts:
    """Where everything is in a state object of `size` bytes: its `tensors` from `start` on, by their places."""

    key: str
    read: Read
    start: int
    metadata: Mapping[str, str]
    tensors: Sequence[_Tensor]
    size: int

    @classmethod
    def opened(cls, read: Read, *, key: str) -> CellParts:
        """Read what says where the tensors are; SpoiltObject if it is damaged."""
        head = read(0, HEADER_BYTES)
        start = 8 + int.from_bytes(head[:8], "little")
        head += read(len(head), start) if start > len(head) else b""
        try:
            header: dict[str, Any] = json.loads(head[8:start])
            metadata = header.pop("__metadata__")
            found = [
                _Tensor(said["data_offsets"][0], said["data_offsets"][1], name, list(said["shape"]), said["dtype"])
                for name, said in header.items()
            ]
            size = start + max((one.last for one in found), default=0)
            return cls(key, read, start, metadata, sorted(found, key=lambda one: one[:3]), size)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise damaged(key, error) from error

    def only(self, sites: Container[str]) -> CellParts:
        """Where what is of these sites is."""
        kept = [one for one in self.tensors if one.name == SEPARATOR or one.name.rsplit(SEPARATOR, 1)[0] in sites]
        return replace(self, tensors=kept)

    def of(self, sites: Mapping[str, Units | None]) -> bytes:
        """The state object with the states of these sites alone, or of some units of each; all others are empty in it.

        Of units it has the rows of tensors with one for each unit, and whole what has another number of rows.
        """
        kept = self.only(sites).tensors
        wanted = {name: units for name, units in sites.items() if units is not None}
        if wanted:
            units = [wanted.get(one.name.rsplit(SEPARATOR, 1)[0]) for one in kept]
            kept = [one if some is None else one.rows_of(some) for one, some in zip(kept, units, strict=True)]
        header: dict[str, Any] = {"__metadata__": self.metadata}
        size = 0
        for one in kept:
            place = [size, size + one.last - one.first]
            header[one.name] = {"dtype": one.dtype, "shape": one.shape, "data_offsets": place}
            size += one.last - one.first
        said = json.dumps(header).encode()
        said += b" " * (-len(said) % 8)
        return b"".join([len(said).to_bytes(8, "little"), said, *self._contents(kept)])

    def _contents(self, tensors: Sequence[_Tensor]) -> Iterator[memoryview]:
        """The bytes of tensors in order of their places; neighbours are read at once."""
        runs: list[list[_Tensor]] = []
        for one in tensors:
            if runs and one.first - runs[-1][-1].last <= GAP_BYTES:
                runs[-1].append(one)
            elif one.first < one.last:
                runs.append([one])
        for run in runs:
            first = run[0].first
            content = memoryview(self.read(self.start + first, self.start + run[-1].last))
            yield from (content[one.first - first : one.last - first] for one in run)

    def sha256(self) -> str:
        """SHA-256 of the whole object, read a part after the other; SpoiltObject if it has another length."""
        hashed, done = hashlib.sha256(), 0
        while done < self.size:
            # one byte more than there should be at the end
            content = self.read(done, min(done + HASHED_BYTES, self.size + 1))
            if not content:
                break
            hashed.update(content)
            done += len(content)
        if done != self.size:
            raise damaged(self.key, ValueError(f"{done} bytes read, {self.size} expected"))
        return hashed.hexdigest()
