"""One pass over rows: pieces of any size in, batches of one size out, and every row in a ledger.

Layer 1: knows no files and no tensors; whoever makes the pieces joins stretches of them to batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from pipeline.batch import Batch
from pipeline.errors import DataError

T = TypeVar("T")


@dataclass(frozen=True)
class Unreadable:
    """Rows of a chunk that could not be read: how many, the number in the file of the first, and why."""

    rows: int
    first_row: int
    reason: str


@dataclass(frozen=True, eq=False)
class Piece(Generic[T]):
    """What one stretch of a chunk gave: `rows` readable rows in their decoded form, and the others by count.

    `made_of` is how many rows of the file those are made of, where a row of a batch is not a row of the file.
    """

    rows: int
    content: T
    excluded: int = 0
    unreadable: tuple[Unreadable, ...] = ()
    made_of: int | None = None


class Stretch(NamedTuple, Generic[T]):
    """Rows `start` to `stop` of a piece's content."""

    content: T
    start: int
    stop: int


@dataclass(eq=False)
class Reading(Generic[T]):
    """One pass over the batches of a chunk; once it has ended, read + unreadable + excluded = rows of the chunk.

    `where` names the data set and file in messages; `pieces` starts a pass, `join` makes a batch of its own memory from
    stretches of pieces; `max_unreadable` is a share of `rows`.
    """

    where: str
    rows: int
    pieces: Callable[[], Iterator[Piece[T]]]
    join: Callable[[Sequence[Stretch[T]]], Batch]
    batch_rows: int
    max_unreadable: float = 0.0
    read: int = 0
    excluded: int = 0
    damage: list[Unreadable] = field(default_factory=list)

    @property
    def unreadable(self) -> int:
        """Rows that could not be read."""
        return sum(one.rows for one in self.damage)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the rows in order, `batch_rows` at a time. DataError where more are unreadable than may be."""
        self.read, self.excluded, self.damage = 0, 0, []
        for stretches in batched(self._counted(), self.batch_rows):
            yield self.join(stretches)
        if self.read + self.unreadable + self.excluded != self.rows:
            raise RuntimeError(f"the ledger of {self.where} does not add up: {self}")

    def _counted(self) -> Iterator[Piece[T]]:
        for piece in self.pieces():
            self.read += piece.rows if piece.made_of is None else piece.made_of
            self.excluded += piece.excluded
            self.damage += piece.unreadable
            self._check_damage()
            yield piece

    def _check_damage(self) -> None:
        allowed = self.max_unreadable * self.rows
        if self.unreadable > allowed:
            first = self.damage[0]
            raise DataError(
                f"{self.where}, row {first.first_row}: {first.reason}; {self.unreadable} of {self.rows} rows of this "
                f"chunk cannot be read, and max_unreadable = {self.max_unreadable:g} allows {int(allowed)}: "
                "repair the file, or raise it"
            )


def batched(pieces: Iterable[Piece[T]], batch_rows: int) -> Iterator[list[Stretch[T]]]:
    """Cut the rows of pieces anew: stretches that together are `batch_rows` rows, or fewer at the end."""
    held: list[Stretch[T]] = []
    missing = batch_rows
    for piece in pieces:
        start = 0
        while start < piece.rows:
            stop = min(piece.rows, start + missing)
            held.append(Stretch(piece.content, start, stop))
            missing -= stop - start
            start = stop
            if not missing:
                yield held
                held, missing = [], batch_rows
    if held:
        yield held


def prefetched(items: Iterator[T]) -> Iterator[T]:
    """The same items, each made by another thread while the one before it is used."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending = pool.submit(next, items, None)
        while (item := pending.result()) is not None:
            pending = pool.submit(next, items, None)
            yield item
