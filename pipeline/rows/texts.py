"""Texts as their bytes: left where Arrow has them until a batch is made of them.

Layer 1: no I/O. N rows, T positions.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch

from pipeline.rows.features import Unwritten
from pipeline.rows.native import address, library
from pipeline.rows.ragged import first_positions
from pipeline.rows.tally import as_text


class Texts(Unwritten):
    """N rows of bytes, each from `start_N` up to `stop_N` of `content`, where Arrow has them; int32 or int64, uint8."""

    def __init__(self, content: np.ndarray, start_N: np.ndarray, stop_N: np.ndarray) -> None:
        self.content, self.start_N, self.stop_N = content, start_N, stop_N
        self.length_N = stop_N - start_N
        self._places = address(content), address(start_N), address(stop_N)
        self._bytes = start_N.itemsize

    def __getitem__(self, usable_N: np.ndarray) -> Texts:
        """The rows where that is True."""
        return Texts(self.content, self.start_N[usable_N], self.stop_N[usable_N])

    def write(self, into: torch.Tensor, *, at: int, start: int, stop: int) -> None:
        """The first T bytes of rows `start` to `stop` as uint8 (N, T), zeros where a shorter one ends."""
        rows, positions = stop - start, into.shape[1]
        if (native := library()) is None:
            found = self.start_N[start:stop], self.length_N[start:stop]
            _write(into.numpy()[at : at + rows], self.content, *found)
        else:
            content, starts, stops = self._places
            skipped, place = self._bytes * start, into.data_ptr() + at * positions
            native.pad(content, starts + skipped, stops + skipped, self._bytes, rows, positions, place)


def _write(into: np.ndarray, content: np.ndarray, start_N: np.ndarray, length_N: np.ndarray) -> None:
    """What the native `pad` does: T bytes of every row, whatever lies behind it, and that made zero."""
    first, stop = start_N.min(), (start_N + length_N).max()
    some = np.concatenate([content[first:stop], np.zeros(into.shape[1], dtype=np.uint8)])
    into[...] = np.lib.stride_tricks.sliding_window_view(some, into.shape[1])[start_N - first]
    into *= first_positions(length_N, into.shape[1])


def texts(column: pa.Array) -> Texts:
    """The bytes of a column of text of any of Arrow's kinds; a null has none."""
    kind = column.type
    known = column if pa.types.is_string(kind) or pa.types.is_large_string(kind) else as_text(column)
    rows = len(known)
    _, offsets, content = known.buffers()
    width = np.int64 if pa.types.is_large_string(known.type) else np.int32
    if not rows or content is None:
        none_N = np.zeros(rows, dtype=width)
        return Texts(np.zeros(0, dtype=np.uint8), none_N, none_N)
    place = np.frombuffer(offsets, dtype=width, offset=known.offset * np.dtype(width).itemsize, count=rows + 1)
    start_N, stop_N = place[:-1], place[1:]
    if known.null_count:
        stop_N = np.where(known.is_null().to_numpy(zero_copy_only=False), start_N, stop_N)
    return Texts(np.frombuffer(content, dtype=np.uint8), start_N, stop_N)
