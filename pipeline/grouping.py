"""How many models one worker holds at a time: as many as share a reading of their rows, and as its memory takes.

Layer 3. Grouping is scheduling: it changes no key and no byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

# of a worker's memory; the rest is for rows, and for what a forward pass holds besides weights and states
SHARE = 0.5


def groups(values: Sequence[T], held: Sequence[int], *, most: int, memory_bytes: int | None) -> Iterator[tuple[T, ...]]:
    """Cut values, in order, into groups of at most `most` that hold at most SHARE of the memory, or are a single one.

    `held` is how many bytes each of them holds; memory that is None is not known and limits nothing.

    >>> list(groups("abcdef", [1, 1, 1, 5, 1, 1], most=2, memory_bytes=4))
    [('a', 'b'), ('c',), ('d',), ('e', 'f')]
    """
    room = None if memory_bytes is None else SHARE * memory_bytes
    group: list[T] = []
    filled = 0
    for value, size in zip(values, held, strict=True):
        if group and (len(group) == most or (room is not None and filled + size > room)):
            yield tuple(group)
            group, filled = [], 0
        group.append(value)
        filled += size
    if group:
        yield tuple(group)
