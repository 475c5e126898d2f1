"""What must be known of a column before a model can be built: how often each value occurs, and the spread of numbers.

Layer 1: pure but for `stored`. One pass: a tally of all rows is the merged tallies of any parts of them.
"""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from math import inf
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import SpoiltObject
from pipeline.hashing import digest
from pipeline.rows.decode import plain_numbers
from pipeline.store import MissingObject, Store


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squares about the mean (Chan, Golub & LeVeque 1979) of what float32 holds of a column.

    And the extremes: of equal numbers the rounded mean is none of them, and the squares about it are not 0.
    """

    n: int = 0
    mean: float = 0.0
    square: float = 0.0
    least: float = inf
    greatest: float = -inf

    def merge(self, other: Moments) -> Moments:
        """The moments of both."""
        if not other.n:
            return self
        n, apart = self.n + other.n, other.mean - self.mean
        square = self.square + other.square + apart**2 * self.n * other.n / n
        extremes = min(self.least, other.least), max(self.greatest, other.greatest)
        return Moments(n, self.mean + apart * other.n / n, square, *extremes)

    @property
    def std(self) -> float:
        """The standard deviation, dividing by n; 1 where nothing varies."""
        varies = self.least < self.greatest and self.square > 0
        return (self.square / self.n) ** 0.5 if varies else 1.0


@dataclass(frozen=True)
class Tally:
    """By column: the counts of its values as text, or the moments of its numbers."""

    counts: Mapping[str, Counter[str]]
    moments: Mapping[str, Moments]

    def merge(self, other: Tally) -> Tally:
        """The tally of the rows of both."""
        return Tally(
            {name: counts + other.counts[name] for name, counts in self.counts.items()},
            {name: moments.merge(other.moments[name]) for name, moments in self.moments.items()},
        )


def tallied(parts: Iterable[Mapping[str, pa.Array]], texts: Sequence[str], numbers: Sequence[str]) -> Tally:
    """The tally of rows given in parts: of the values in columns of text, of the moments of columns of numbers."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in texts}
    moments = dict.fromkeys(numbers, Moments())
    for part in parts:
        for name in texts:
            counts[name].update(_counted(part[name]))
        for name in numbers:
            moments[name] = moments[name].merge(_moments(part[name]))
    return Tally(counts, moments)


def as_text(column: pa.Array) -> pa.Array:
    """Values as text, so that 1 and "1" are one value."""
    plain = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
    return plain.cast(pa.string())


def in_utf8(texts: pa.Array) -> pa.Array:
    """The texts, null where they are not UTF-8: files can hold such, and Arrow reads them without a word."""
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid:
        return pa.array(map(_decoded, texts.cast(pa.binary()).to_pylist()), pa.string())
    return texts


def _decoded(content: bytes | None) -> str | None:
    try:
        return None if content is None else content.decode()
    except UnicodeDecodeError:
        return None


def _counted(column: pa.Array) -> dict[str, int]:
    found = pc.value_counts(as_text(column).drop_null())
    values = in_utf8(found.field("values")).to_pylist()
    counted = zip(values, found.field("counts").to_pylist(), strict=True)
    return {value: count for value, count in counted if value is not None}


def _moments(column: pa.Array) -> Moments:
    # not Arrow's cast, which takes no integer that float64 rounds
    values = plain_numbers(column).astype(np.float64)
    values = values[np.abs(values) <= np.finfo(np.float32).max]
    if not len(values):
        return Moments()
    mean = float(values.mean())
    square = float(np.square(values - mean).sum())
    return Moments(len(values), mean, square, float(values.min()), float(values.max()))


def frequent(counts: Mapping[str, int], *, least: int, most: int) -> tuple[str, ...]:
    """The values that occur `least` times or more, by falling count and then by name, at most `most` of them."""
    ordered = sorted(counts, key=lambda value: (-counts[value], value))
    return tuple(value for value in ordered if counts[value] >= least)[:most]


@dataclass(frozen=True)
class Vocabulary:
    """The values of each column that a model knows by number; whatever else occurs is UNKNOWN. Scales of numbers."""

    values: Mapping[str, tuple[str, ...]]
    scales: Mapping[str, tuple[float, float]]

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many numbers each column takes, UNKNOWN included."""
        return tuple(len(known) + 1 for known in self.values.values())

    def as_json(self) -> dict[str, Any]:
        """JSON values."""
        return {"values": {name: list(known) for name, known in self.values.items()}, "scales": dict(self.scales)}

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Vocabulary:
        """The vocabulary that JSON values stand for."""
        scales = {name: (mean, std) for name, (mean, std) in found["scales"].items()}
        return cls({name: tuple(known) for name, known in found["values"].items()}, scales)


UNKNOWN = 0
# how it is written
UNSEEN = "(unseen)"
# raised whenever the same rows would give another vocabulary
TALLY_VERSION = 4


# a million values take a second to read and parse, which every task of every model would wait for
KEPT_VOCABULARIES = 4
# by store and key, which is the digest of all that a vocabulary is made of
_PARSED: OrderedDict[tuple[str, str], Vocabulary] = OrderedDict()


def stored(store: Store, made_of: Any, make: Callable[[], Vocabulary]) -> Vocabulary:
    """The vocabulary that the store holds for these JSON values; made and stored now if it holds none.

    A process reads and parses each once, and keeps the last few.
    """
    key = f"data/vocabularies/{digest([TALLY_VERSION, made_of])}.json"
    found = _PARSED.pop((store.url, key), None) or _read(store, key, make)
    _PARSED[store.url, key] = found
    while len(_PARSED) > KEPT_VOCABULARIES:
        _PARSED.popitem(last=False)
    return found


def forget_parsed() -> None:
    """Let go of every vocabulary."""
    _PARSED.clear()


def _read(store: Store, key: str, make: Callable[[], Vocabulary]) -> Vocabulary:
    try:
        content = store.get(key)
    except MissingObject:
        content = json.dumps(make().as_json(), sort_keys=True).encode()
        store.put_once(key, content)
    try:
        return Vocabulary.of(json.loads(content))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SpoiltObject(f"{key} is damaged ({type(error).__name__}: {error}); delete it and run again") from error


# known values for each one that is looked up, above which Python's look-up is the faster: Arrow's makes a table of all
# that is known each time, a quarter of a second of a million
FEW = 16


class Numbering:
    """The number of each value of a column: from 1 in the order of `known`, UNKNOWN where it is null or not among them.

    Looks up each different value once. Remembers the numbers of the dictionary that it saw last: the parts of a row
    group share one.
    """

    def __init__(self, known: Sequence[str]) -> None:
        self._known = pa.array(known, pa.string())
        self._last: tuple[pa.Array, np.ndarray] | None = None

    def of(self, column: pa.Array) -> np.ndarray:
        """int32 (N,)."""
        encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
        of_value, place_N = self._of_dictionary(encoded.dictionary), encoded.indices
        if place_N.null_count:
            # a narrow type may hold the places of all values, and not the one behind them
            place_N = place_N.cast(pa.int64()).fill_null(len(of_value) - 1)
        return of_value.take(place_N.to_numpy(zero_copy_only=False), mode="clip")

    def _of_dictionary(self, dictionary: pa.Array) -> np.ndarray:
        if self._last is None or not _is_same(self._last[0], dictionary):
            # behind the last value: a null
            self._last = dictionary, np.append(self._looked_up(dictionary), np.int32(UNKNOWN))
        return self._last[1]

    def _looked_up(self, dictionary: pa.Array) -> np.ndarray:
        values = as_text(dictionary)
        if len(self._known) > FEW * len(values):
            found = map(self._number.get, in_utf8(values).to_pylist(), repeat(UNKNOWN))
            return np.fromiter(found, dtype=np.int32, count=len(values))
        place = pc.index_in(values, value_set=self._known)
        return (place.fill_null(-1) if place.null_count else place).to_numpy() + np.int32(1)

    @cached_property
    def _number(self) -> dict[str, int]:
        return {value: number for number, value in enumerate(self._known.to_pylist(), UNKNOWN + 1)}


def _is_same(one: pa.Array, other: pa.Array) -> bool:
    """Whether two arrays are the same memory."""
    if len(one) != len(other) or one.offset != other.offset or one.type != other.type:
        return False
    buffers = zip(one.buffers(), other.buffers(), strict=True)
    return all((a and a.address) == (b and b.address) for a, b in buffers)
