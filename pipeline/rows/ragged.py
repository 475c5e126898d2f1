"""Sequences of any length as arrays of one length with a mask: time series of numbers, and tokens.

Layer 1: no I/O. N rows, C channels, T positions.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from pipeline.counted import counted
from pipeline.rows.decode import plain_numbers
from pipeline.rows.features import Unwritten
from pipeline.rows.native import address, library


class Sequences(NamedTuple):
    """Values of all usable rows one behind the other, (values, C); how many are each row's; which rows are usable."""

    values_VC: np.ndarray
    length_N: np.ndarray
    usable_N: np.ndarray
    reason: str


class Mask(Unwritten):
    """bool (N, T), True at as many of T positions as each row has values."""

    def __init__(self, length_N: np.ndarray) -> None:
        wide = length_N.dtype != np.int32
        self.length_N = np.ascontiguousarray(length_N, dtype=np.int64 if wide else np.int32)
        self._place, self._bytes = address(self.length_N), self.length_N.itemsize

    def __getitem__(self, usable_N: np.ndarray) -> Mask:
        """The mask of the rows where that is True."""
        return Mask(self.length_N[usable_N])

    def write(self, into: torch.Tensor, *, at: int, start: int, stop: int) -> None:
        """Write the mask of rows `start` to `stop`."""
        rows, positions = stop - start, into.shape[1]
        if (native := library()) is None:
            first_positions(self.length_N[start:stop], positions, out=into.numpy()[at : at + rows])
        else:
            place = into.data_ptr() + at * positions
            native.first_positions(self._place + self._bytes * start, self._bytes, rows, positions, place)


def padded(found: Sequences, positions: int) -> np.ndarray:
    """(N, C, T) of the first T values of each row, zeros where a shorter one ends.

    A row's values lie in memory as they came, step by step.
    """
    mask_NT = first_positions(found.length_N, positions)
    x_NTC = np.zeros((*mask_NT.shape, found.values_VC.shape[1]), dtype=found.values_VC.dtype)
    # a step at a time, whatever its numbers are: three times as fast as number by number
    step = np.dtype((np.void, x_NTC.shape[2] * x_NTC.itemsize))
    kept_VC = np.ascontiguousarray(_without_what_is_behind(found, positions))
    x_NTC.view(step)[..., 0][mask_NT] = kept_VC.view(step)[:, 0]
    return x_NTC.transpose(0, 2, 1)


def first_positions(length_N: np.ndarray, positions: int, out: np.ndarray | None = None) -> np.ndarray:
    """(N, T), True at as many of T positions as each row has values."""
    # compared as small numbers: seven times as fast as int64
    kind = np.min_scalar_type(positions)
    return np.less(np.arange(positions, dtype=kind), np.minimum(length_N, positions).astype(kind)[:, None], out=out)


def _without_what_is_behind(found: Sequences, positions: int) -> np.ndarray:
    if not (found.length_N > positions).any():
        return found.values_VC
    start_N = found.length_N.cumsum() - found.length_N
    within_V = np.arange(len(found.values_VC)) - np.repeat(start_N, found.length_N)
    return found.values_VC[within_V < positions]


def lists(column: pa.Array) -> tuple[pa.Array, np.ndarray, np.ndarray]:
    """The values of a column of lists one behind the other, each row's length (0 of a null), and which are no null."""
    length_N = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False)
    return column.flatten(), length_N.astype(np.int64), column.is_valid().to_numpy(zero_copy_only=False)


def steps(column: pa.Array, channels: int) -> Sequences:
    """A column of lists of steps: each a number, or a list of a number for each of several channels."""
    values, length_N, usable_N = lists(column)
    reason = "the list is null"
    right_V = np.ones(len(values), dtype=bool)
    if pa.types.is_nested(values.type):
        if values.null_count or not pa.types.is_fixed_size_list(values.type):
            width_V = pc.list_value_length(values).fill_null(-1).to_numpy(zero_copy_only=False)
            right_V = width_V == channels
        if not right_V.all():
            reason = f"a step has {max(0, width_V[~right_V][0])} numbers, expected {channels}"
            values = values.filter(pa.array(right_V))
        values = values.flatten()
    if not values.null_count and right_V.all():
        return Sequences(
            _numbers(values).reshape(-1, channels), length_N[usable_N], usable_N, _unless(usable_N, reason)
        )
    whole_RC = values.is_valid().to_numpy(zero_copy_only=False).reshape(-1, channels)
    if not whole_RC.all():
        reason = "a number of the list is null"
    values_VC = np.zeros((len(right_V), channels))
    values_VC[right_V] = plain_numbers(values).reshape(-1, channels)
    right_V[right_V] = whole_RC.all(1)
    return _without(Sequences(values_VC, length_N, usable_N, reason), right_V)


def _numbers(values: pa.Array) -> np.ndarray:
    """Numbers without a null in the type they have, in Arrow's own memory where they can be."""
    kind = values.type
    plain = values.cast(pa.float64()) if pa.types.is_decimal(kind) or pa.types.is_boolean(kind) else values
    found: np.ndarray = plain.to_numpy(zero_copy_only=False)
    return found


def _unless(usable_N: np.ndarray, reason: str) -> str:
    return "" if usable_N.all() else reason


def _without(found: Sequences, right_V: np.ndarray) -> Sequences:
    """Only the rows all of whose values are right."""
    row_V = np.repeat(np.arange(len(found.length_N)), found.length_N)
    usable_N = found.usable_N & (np.bincount(row_V[~right_V], minlength=len(found.length_N)) == 0)
    kept_VC = found.values_VC[usable_N[row_V]]
    return Sequences(kept_VC, found.length_N[usable_N], usable_N, _unless(usable_N, found.reason))


def of_lengths(found: Sequences, least: int, most: int) -> Sequences:
    """Only the rows of a length from `least` to `most`."""
    right_K = (found.length_N >= least) & (found.length_N <= most)
    if right_K.all():
        return found
    usable_N = found.usable_N.copy()
    usable_N[np.flatnonzero(usable_N)[~right_K]] = False
    expected = f"{least}" if least == most else f"{least} to {most}"
    first = counted(int(found.length_N[~right_K][0]), "step")
    reason = found.reason or f"the sequence has {first}, expected {expected}"
    keep_V = np.repeat(right_K, found.length_N)
    return Sequences(found.values_VC[keep_V], found.length_N[right_K], usable_N, reason)
