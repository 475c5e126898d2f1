"""One pass over rows: pieces of any size in, batches of one size out, and every row in a ledger.

Layer 1: knows no files and no tensors; whoever makes the pieces joins stretches of them to batches.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from pipeline.batch import Batch, misnamed
from pipeline.errors import ContractError, DataError

T = TypeVar("T")
G = TypeVar("G")


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
class Reading(Generic[G, T]):
    """One pass over the batches of a chunk; once it has ended, read + unreadable + excluded = rows of the chunk.

    `where` names the data set and file in messages; `fetch` starts a pass over what storage has of the chunk, which
    another thread takes up to `ahead` steps before it is used, `pieces` decodes that, and `join` makes a batch of its
    own memory from stretches of pieces; `max_unreadable` is a share of `rows`.
    """

    where: str
    rows: int
    fetch: Callable[[], Iterator[G]]
    pieces: Callable[[Iterator[G]], Iterator[Piece[T]]]
    join: Callable[[Sequence[Stretch[T]]], Batch]
    batch_rows: int
    max_unreadable: float = 0.0
    ahead: int = 1
    read: int = 0
    excluded: int = 0
    damage: list[Unreadable] = field(default_factory=list)

    @property
    def unreadable(self) -> int:
        """Rows that could not be read."""
        return sum(one.rows for one in self.damage)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the rows in order, `batch_rows` at a time. DataError where more are unreadable than may be.

        ContractError where pieces or batches have not the rows that they should.
        """
        return self.batches(prefetched(self.fetch(), ahead=self.ahead))

    def batches(self, fetched: Iterator[G]) -> Iterator[Batch]:
        """The same of what `fetch` gave."""
        self.read, self.excluded, self.damage = 0, 0, []
        for stretches in batched(self._counted(fetched), self.batch_rows):
            yield self._joined(stretches)
        if self.read + self.unreadable + self.excluded != self.rows:
            raise ContractError(
                f"the ledger of {self.where} does not add up: {self.read} rows read, {self.unreadable} unreadable, "
                f"{self.excluded} excluded; expected the {self.rows} of the chunk"
            )

    def _joined(self, stretches: Sequence[Stretch[T]]) -> Batch:
        batch = self.join(stretches)
        expected = sum(one.stop - one.start for one in stretches)
        counts = {"uids": len(batch.uid_N), "labels": expected if batch.label_N is None else len(batch.label_N)}
        for named, count in counts.items():
            if count != expected:
                raise ContractError(f"{self.where}: a batch has {count} {named}; expected {expected}, one for each row")
        problem = misnamed(batch.uid_N)
        if batch.label_N is not None and batch.label_N.dtype != torch.int64:
            problem = f"label_N is {str(batch.label_N.dtype).removeprefix('torch.')}: expected int64"
        if problem is not None:
            raise ContractError(f"{self.where}: {problem}")
        return batch

    def _counted(self, fetched: Iterator[G]) -> Iterator[Piece[T]]:
        for piece in self.pieces(fetched):
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


def batches_in_turn(readings: Sequence[Reading[Any, Any]]) -> Generator[Iterator[Batch]]:
    """The batches of each reading; the first rows of one are fetched while the last of the one before are decoded."""
    ahead = max((reading.ahead for reading in readings), default=1)
    for reading, fetched in zip(readings, in_turn([one.fetch for one in readings], ahead=ahead), strict=True):
        yield reading.batches(fetched)


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


def prefetched(items: Iterator[T], *, ahead: int = 1) -> Iterator[T]:
    """The same items, each made by another thread while the `ahead` before it are used."""
    for same in in_turn([lambda: items], ahead=ahead):
        yield from same


def in_turn(starts: Sequence[Callable[[], Iterator[T]]], *, ahead: int = 1) -> Generator[Iterator[T]]:
    """What each of `starts` begins, one behind the other, made by one other thread `ahead` steps before it is used.

    With one step each item is made while the one before it is used, the first of an iterator while the last of the one
    before is. What making an item raises is raised where that is asked for, and concerns no other iterator. An iterator
    that is not used up when the next one is asked for is left.
    """
    thread = ThreadPoolExecutor(max_workers=1)
    try:
        yield from _Turns(thread, starts, ahead)
    finally:
        thread.shutdown(cancel_futures=True)


class _Made(NamedTuple, Generic[T]):
    """Of the iterator of a turn: its next item, or what it raised, or neither: it has ended."""

    turn: int
    item: T | None = None
    error: BaseException | None = None


class _Turns(Generic[T]):
    """What `in_turn` knows. `_make` runs in its thread, and nothing else touches the iterators."""

    def __init__(self, thread: ThreadPoolExecutor, starts: Sequence[Callable[[], Iterator[T]]], ahead: int) -> None:
        self._thread = thread
        self._starts = starts
        self._made: SimpleQueue[_Made[T]] = SimpleQueue()
        # the turn that is used, and the one that is made
        self._used = self._making = 0
        self._items: Iterator[T] | None = None
        for _ in range(ahead):
            thread.submit(self._make)

    def __iter__(self) -> Iterator[Iterator[T]]:
        for turn in range(len(self._starts)):
            self._used = turn
            yield self._items_of(turn)

    def _items_of(self, turn: int) -> Iterator[T]:
        while True:
            if turn != self._used:
                raise RuntimeError(f"the iterator of turn {turn} was left for that of turn {self._used}")
            made = self._made.get()
            if made.item is not None:
                # one more for each that is taken or left
                self._thread.submit(self._make)
            if made.turn < turn:
                continue
            if made.error is not None:
                try:
                    raise made.error
                finally:
                    # which knows this frame, and by it all that waits
                    del made
            if made.item is None:
                return
            item = made.item
            del made
            yield item
            # what has been used is not kept while the next one is waited for
            del item

    def _make(self) -> None:
        """Make one item, and say of each iterator that ends before there is one that it has."""
        is_end = True
        while is_end and self._making < len(self._starts):
            made = self._next()
            is_end = made.item is None
            if is_end:
                self._items, self._making = None, self._making + 1
            self._made.put(made)
            # an error knows this frame
            del made

    def _next(self) -> _Made[T]:
        try:
            if self._items is None:
                # of one that is left, too: to begin may be to take the next of something
                self._items = self._starts[self._making]()
            is_left = self._making < self._used
            return _Made(self._making, None if is_left else next(self._items, None))
        except BaseException as error:  # noqa: BLE001 - raised where the item is waited for
            return _Made(self._making, error=error)
