"""Which splits rows are of: what the footers of files say for sure and, what they leave open, as the column has it.

Layer 1. The extremes of a row group are values of it; of what lies between them only the column itself tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.rows.footers import Footer
from pipeline.rows.groups import read_groups
from pipeline.rows.tally import in_utf8

T = TypeVar("T")

# files of which the column is read at a time
READERS = 16
# writers may cut extremes of text off at as many bytes, and then they are no values
WHOLE_BYTES = 64


@dataclass(frozen=True, eq=False)
class SplitColumn:
    """The column `name` of some files, which says of each row in which split it is; `locate` gives a file's URL."""

    name: str
    footers: Sequence[Footer]
    locate: Callable[[str], str]

    def told(self, split: str) -> bool:
        """Whether the footers alone say that a row is of the split."""
        return any(split in _values(footer, group, self.name) for footer in self.footers for group in footer.groups)

    def found(self, split: str, may_hold: Callable[[Footer, int], bool]) -> bool:
        """Whether a row is of the split, read from the groups that may hold it until one does, or is damaged."""

        def is_there(footer: Footer) -> bool:
            asked = [group for group in footer.groups if may_hold(footer, group)]
            return any(values is None or split in values for values in self._read(footer, asked))

        return any(_each(is_there, self.footers))

    def known(self) -> list[str]:
        """Every split that a row is of, in order; groups of which the extremes differ are read, as far as they can."""

        def values_of(footer: Footer) -> set[str]:
            told = [_values(footer, group, self.name) for group in footer.groups]
            is_all = [len(values) == 1 for values in told]
            read = self._read(footer, [group for group in footer.groups if not is_all[group]])
            return set().union(*told, *(values for values in read if values is not None))

        return sorted(set().union(*_each(values_of, self.footers)))

    def _read(self, footer: Footer, groups: Sequence[int]) -> Iterator[set[str] | None]:
        """The values in each of these groups; None where it is damaged."""
        if not groups:
            return
        for group in read_groups(self.locate(footer.name), footer.file_id, groups, [self.name]):
            texts = [in_utf8(pc.unique(part[self.name].cast(pa.string()))) for part in group.parts]
            yield None if group.damage else {value for some in texts for value in some.drop_null().to_pylist()}


def as_named(bound: object) -> str:
    """A value of the column as a job names it."""
    if isinstance(bound, bytes):
        return bound.decode(errors="replace")
    return str(bound).lower() if isinstance(bound, bool) else str(bound)


def _values(footer: Footer, group: int, column: str) -> set[str]:
    """What the footer says are values of a row group; all of them if it is one and the same."""
    named = [as_named(bound) for bound in footer.bounds(group, column) or ()]
    return {name for name in named if len(name.encode()) < WHOLE_BYTES}


def _each(make: Callable[[Footer], T], footers: Sequence[Footer]) -> Iterator[T]:
    """What is made of each file, in order, several at a time; those behind the last one that is taken are left."""
    with ThreadPoolExecutor(READERS) as pool:
        try:
            yield from pool.map(make, footers)
        finally:
            pool.shutdown(cancel_futures=True)
