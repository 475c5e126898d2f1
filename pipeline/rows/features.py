"""What a source hands to a model of each row: the contract, and plain numbers.

Layer 1: no I/O.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, NamedTuple, Self, TypeAlias

import numpy as np
import pyarrow as pa
import torch
from pyarrow import types

from pipeline.batch import Batch
from pipeline.names import Names
from pipeline.rows.decode import column_features, list_features
from pipeline.rows.reading import Piece

# rows decoded at a time: enough to hide Python, little beside a row group
PART_ROWS = 8192


class Role(NamedTuple):
    """A column that is needed, the type it must have in words, and as a test."""

    column: str
    expected: str
    fits: Callable[[pa.DataType], bool]


class Part(NamedTuple):
    """One of the tensors that a row becomes: its shape within a row, and its type."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Unwritten(ABC):
    """A part of some rows that is written where a batch is made of them, and nowhere before."""

    @abstractmethod
    def __getitem__(self, usable_N: np.ndarray) -> Self:
        """The rows where that is True."""

    @abstractmethod
    def write(self, into: torch.Tensor, *, at: int, start: int, stop: int) -> None:
        """Write rows `start` to `stop` to those from `at` on of a contiguous tensor of the part's shape and type."""


Values: TypeAlias = np.ndarray | Unwritten


def narrowest(values: int) -> torch.dtype:
    """The type of fewest bytes that holds 0 to `values` − 1, of those that a batch may be `narrow` with."""
    kinds = (torch.uint8, torch.int16, torch.int32, torch.int64)
    return next(kind for kind in kinds if values - 1 <= torch.iinfo(kind).max)


class Usable(NamedTuple):
    """Decoded features: of the usable rows the values of each part; which rows those are; why the first other is not.

    An array may have any type and any shape of as many numbers per row as its part, perhaps in Arrow's own memory.
    `length_N` is how many positions each usable row has before it is cut, where a label can be of a position.
    """

    parts: tuple[Values, ...]
    usable_N: np.ndarray
    reason: str
    length_N: np.ndarray | None = None


class Decoded(NamedTuple):
    """Readable rows: the parts of their features, uids and classes as int64, (N,) or of positions (N, T)."""

    parts: tuple[Values, ...]
    uid_N: np.ndarray
    label_N: np.ndarray | None


NOTHING = Decoded((), np.zeros(0, dtype=np.int64), None)


class FeatureFormat(ABC):
    """How some columns become what a model takes; `shape` is that of one row's numbers, as a model's task has it."""

    shape: tuple[int, ...]

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """Every column that is read."""

    @property
    @abstractmethod
    def parts(self) -> tuple[Part, ...]:
        """The tensors of a batch."""

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What decides how rows are read, as JSON values."""

    @abstractmethod
    def roles(self) -> Iterator[Role]:
        """What each column must be."""

    @abstractmethod
    def decode(self, rows: pa.RecordBatch) -> Usable:
        """The features of rows."""

    @property
    def positions(self) -> int | None:
        """How many positions a row has at most, where a label can be of a position; else None."""
        return None

    @property
    def names(self) -> Names:
        """What people call the numbers of a row, as far as the format knows."""
        return Names()

    def batch(self, tensors: tuple[torch.Tensor, ...], uid_N: torch.Tensor, label_N: torch.Tensor | None) -> Batch:
        """The batch of the parts of some rows: all of them are positional inputs, unless the format says otherwise."""
        return Batch(inputs=tensors, uid_N=uid_N, label_N=label_N)

    @property
    def encoded(self) -> tuple[str, ...]:
        """Columns of text of which the numbers in the file's own dictionary are enough."""
        return ()

    @property
    def part_rows(self) -> int:
        """How many rows are decoded at a time."""
        return PART_ROWS

    @property
    def keeps_rows(self) -> bool:
        """Whether a row of a batch is a row of the file."""
        return True

    def repacked(self, pieces: Iterator[Piece[Decoded]]) -> Iterator[Piece[Decoded]]:
        """The pieces of a chunk, where rows of a batch are not rows of the file: made from these."""
        return pieces


@dataclass(frozen=True)
class Numbers(FeatureFormat):
    """Numbers of one shape. `nested`: one column of lists of prod(shape) numbers; else each is a column of numbers."""

    features: tuple[str, ...]
    nested: bool
    shape: tuple[int, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of numbers."""
        return self.features

    @property
    def parts(self) -> tuple[Part, ...]:
        """One tensor of float32."""
        return (Part(self.shape, torch.float32),)

    @property
    def identity(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)

    @property
    def names(self) -> Names:
        """The columns', where each number has one."""
        return Names() if self.nested else Names(features=self.features)

    def roles(self) -> Iterator[Role]:
        """Lists, or numbers."""
        for name in self.features:
            if self.nested:
                yield Role(name, f"lists of {prod(self.shape)} numbers", self._is_list_of_numbers)
            else:
                yield Role(name, "numbers", is_number)

    def decode(self, rows: pa.RecordBatch) -> Usable:
        """The numbers in whatever type they have."""
        if self.nested:
            found = list_features(rows[self.features[0]], prod(self.shape))
        else:
            found = column_features([rows[name] for name in self.features], self.features)
        return Usable((found.x_NF,), found.usable_N, found.reason)

    def _is_list_of_numbers(self, kind: pa.DataType) -> bool:
        if types.is_fixed_size_list(kind):
            return is_number(kind.value_type) and kind.list_size == prod(self.shape)
        return is_list(kind) and is_number(kind.value_type)


def is_integer(kind: pa.DataType) -> bool:
    """Whether values are whole numbers; truth values are."""
    return bool(types.is_integer(kind) or types.is_boolean(kind))


def is_number(kind: pa.DataType) -> bool:
    """Whether values are numbers of any type."""
    return is_integer(kind) or bool(types.is_floating(kind) or types.is_decimal(kind))


def is_text(kind: pa.DataType) -> bool:
    """Whether values are strings, dictionary-encoded ones included."""
    plain = kind.value_type if types.is_dictionary(kind) else kind
    return bool(types.is_string(plain) or types.is_large_string(plain) or types.is_string_view(plain))


def is_list(kind: pa.DataType) -> bool:
    """Whether values are lists of any length."""
    return bool(types.is_list(kind) or types.is_large_list(kind))


def is_name(kind: pa.DataType) -> bool:
    """Whether values can name something: strings or whole numbers."""
    return is_text(kind) or is_integer(kind)
