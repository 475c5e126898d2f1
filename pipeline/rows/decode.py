"""Columns of Arrow rows as tensors: features, labels and row uids, with what cannot be used told apart.

Layer 1: pure; imports nothing of the pipeline. The caller adds the file's name to what is wrong.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

UID_MASK = (1 << 63) - 1
UNKNOWN_CLASS = -1


class RowError(Exception):
    """A value that no setting lets pass: `row` counts from the first one given, the message says what is wrong."""

    def __init__(self, row: int, message: str) -> None:
        super().__init__(message)
        self.row = row


class Features(NamedTuple):
    """`x_NF` numbers of the usable rows; `usable_N` which those are; `reason` why the first other one is not."""

    x_NF: np.ndarray
    usable_N: np.ndarray
    reason: str


def list_features(column: pa.Array, width: int) -> Features:
    """Features from a column of lists of `width` numbers; a null, one inside, or another length is not usable."""
    lengths_N = pc.list_value_length(column).fill_null(-1).to_numpy(zero_copy_only=False)
    usable_N = lengths_N == width
    reason = "" if usable_N.all() else _length_reason(int(lengths_N[~usable_N][0]), width)
    values = (column if usable_N.all() else column.filter(pa.array(usable_N))).flatten()
    x_NF = plain_numbers(values).reshape(-1, width)
    if values.null_count:
        whole = ~values.is_null().to_numpy(zero_copy_only=False).reshape(-1, width).any(1)
        x_NF = x_NF[whole]
        usable_N = usable_N.copy()
        usable_N[np.flatnonzero(usable_N)[~whole]] = False
        reason = reason or "a number of the list is null"
    return Features(x_NF, usable_N, reason)


def _length_reason(length: int, width: int) -> str:
    return "the list is null" if length < 0 else f"the list has {length} numbers, expected {width}"


def column_features(columns: Sequence[pa.Array], names: Sequence[str]) -> Features:
    """Features from one column each; a row with a null is not usable."""
    rows = len(columns[0])
    usable_N, reason = without_null(columns, names, rows)
    x_NF = np.empty((rows, len(columns)), dtype=np.float32)
    for index, column in enumerate(columns):
        with np.errstate(over="ignore"):  # beyond float32: infinite
            x_NF[:, index] = plain_numbers(column)
    return Features(x_NF if usable_N.all() else x_NF[usable_N], usable_N, reason)


def without_null(columns: Sequence[pa.Array], names: Sequence[str], rows: int) -> tuple[np.ndarray, str]:
    """Which rows have a value in every column, and why the first other one is not usable."""
    usable_N = np.ones(rows, dtype=bool)
    reason = ""
    for column, name in zip(columns, names, strict=True):
        if column.null_count:
            usable_N &= column.is_valid().to_numpy(zero_copy_only=False)
            reason = reason or f"column {name!r} is null"
    return usable_N, reason


def plain_numbers(values: pa.Array) -> np.ndarray:
    """The numbers in whatever type they have, perhaps Arrow's own memory; nulls become NaN."""
    if pa.types.is_decimal(values.type) or (values.null_count and pa.types.is_boolean(values.type)):
        values = values.cast(pa.float64())
    array: np.ndarray = values.to_numpy(zero_copy_only=False)
    return array


def whole_numbers(column: pa.Array) -> pa.Array:
    """Integers as int64; what is beyond them, of uint64, as their greatest."""
    if pa.types.is_uint64(column.type):
        column = pc.min_element_wise(column, pa.scalar(UID_MASK, pa.uint64()), skip_nulls=False)
    return column.cast(pa.int64())


def _shown(value: pa.Scalar) -> str:
    try:
        return repr(value.as_py())
    except UnicodeDecodeError:
        return repr(value.cast(pa.string()).cast(pa.binary()).as_py())


def class_labels(column: pa.Array, *, classes: int, names: tuple[str, ...] | None) -> np.ndarray:
    """int64 class of each row, −1 where it is null or −1. RowError at the first that is no class."""
    if names is not None:
        labels = pc.index_in(column.cast(pa.string()), value_set=pa.array(names))
        wrong = pc.and_(labels.is_null(), column.is_valid())
        expected = f"one of {', '.join(names)}"
    else:
        labels = whole_numbers(column)
        wrong = pc.fill_null(pc.or_(pc.less(labels, UNKNOWN_CLASS), pc.greater_equal(labels, classes)), False)
        expected = f"0 to {classes - 1}, or −1 or null for unknown"
    if (first := pc.index(wrong, True).as_py()) >= 0:
        raise RowError(first, f"label {_shown(column[first])}: expected {expected}")
    return np.array(labels.fill_null(UNKNOWN_CLASS).to_numpy(zero_copy_only=False), dtype=np.int64)


class PositionLabels(NamedTuple):
    """`label_NT` classes of the usable rows' positions; `usable_N` which those are; `reason` of the first other one."""

    label_NT: np.ndarray
    usable_N: np.ndarray
    reason: str


def position_labels(
    column: pa.Array, length_N: np.ndarray, positions: int, *, classes: int, names: tuple[str, ...] | None
) -> PositionLabels:
    """int64 classes of the first T positions of rows of these lengths, −1 behind their end and where one is null or −1.

    A null says that all of a row are unknown; a list of another length than the row's is not usable. RowError at the
    first value that is no class.
    """
    listed_N = pc.list_value_length(column).fill_null(-1).to_numpy(zero_copy_only=False)
    usable_N = has_fitting_labels(column, length_N)
    wrong = np.flatnonzero(~usable_N)
    reason = f"{listed_N[wrong[0]]} labels for {length_N[wrong[0]]} positions" if len(wrong) else ""
    known = column if usable_N.all() else column.filter(pa.array(usable_N))
    count_N = np.maximum(listed_N[usable_N], 0)
    row_V = np.repeat(np.arange(len(count_N)), count_N)
    try:
        label_V = class_labels(known.flatten(), classes=classes, names=names)
    except RowError as error:
        raise RowError(int(np.flatnonzero(usable_N)[row_V[error.row]]), str(error)) from None
    place_V = np.arange(len(row_V)) - np.repeat(count_N.cumsum() - count_N, count_N)
    label_NT = np.full((len(count_N), positions), UNKNOWN_CLASS, dtype=np.int64)
    kept_V = place_V < positions
    label_NT[row_V[kept_V], place_V[kept_V]] = label_V[kept_V]
    return PositionLabels(label_NT, usable_N, reason)


def has_fitting_labels(column: pa.Array, length_N: np.ndarray) -> np.ndarray:
    """Which rows have a list of as many labels as they have positions, or a null in its place."""
    listed_N = pc.list_value_length(column).fill_null(-1).to_numpy(zero_copy_only=False)
    fits_N: np.ndarray = (listed_N == length_N) | (listed_N < 0)
    return fits_N


def key_uids(column: pa.Array) -> np.ndarray:
    """int64 uid of each row from the column that names it: an integer ≥ 0 as it is, a string by 63 bits of BLAKE2b."""
    if (first := pc.index(column.is_null(), True).as_py()) >= 0:
        raise RowError(first, "the key is null")
    if pa.types.is_integer(column.type):
        keys = column.to_numpy(zero_copy_only=False)
        wrong = np.flatnonzero((keys < 0) | (keys > UID_MASK))
        if len(wrong):
            raise RowError(int(wrong[0]), f"key {keys[wrong[0]]}: expected 0 to 2⁶³ − 1")
        return keys.astype(np.int64)
    # as bytes: a file can hold text that is not UTF-8
    names = column.cast(pa.string()).cast(pa.binary()).to_pylist()
    hashes = [hashlib.blake2b(name, digest_size=8).digest() for name in names]
    return (np.frombuffer(b"".join(hashes), dtype="<u8") & np.uint64(UID_MASK)).astype(np.int64)
