"""Arranges what a model computed as entries × positions × channels, by views wherever strides allow.

Layer 1: pure torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeline.flow.rows import Rows


@dataclass(frozen=True, eq=False)
class Arranged:
    """`tensor` is (L, S, C); `row_L` and `position_LS` as in `Presentations`."""

    tensor: torch.Tensor
    row_L: torch.Tensor | None
    position_LS: torch.Tensor | None


def arrange(tensor: torch.Tensor, rows: Rows, channels: Sequence[int], *, split: bool = True) -> Arranged:
    """Rows first, channels last, the other axes between them as positions, in order.

    Rows that recur within their axis become entries of their own, unless `split` and a view makes them positions.
    """
    channel_axes = [axis % tensor.dim() for axis in channels]
    if rows.axis is None:
        tensor, rows = tensor.unsqueeze(0), _as_entry(rows)
        channel_axes = [axis + 1 for axis in channel_axes]
    entry_axis = rows.axis or 0
    if rows.index is None and split and rows.rows > 0:
        outer = tensor.shape[entry_axis] // max(rows.rows * rows.inner, 1)
        if (outer == 1) != (rows.inner == 1):
            sizes = (rows.rows, rows.inner) if outer == 1 else (outer, rows.rows)
            # as a view of the same: `unflatten` goes a long way through Python
            tensor = tensor.view(*tensor.shape[:entry_axis], *sizes, *tensor.shape[entry_axis + 1 :])
            channel_axes = [axis + (axis > entry_axis) for axis in channel_axes]
            entry_axis += outer != 1
    flat = _flat(tensor, entry_axis, channel_axes)
    if rows.index is None and len(flat) == rows.rows:
        return Arranged(flat, None, None)
    row_L = rows.of_entries(len(flat), tensor.device)
    return Arranged(flat, row_L, number_positions(row_L, flat.shape[1], rows.rows))


def _as_entry(rows: Rows) -> Rows:
    return Rows(0, rows.rows, index=rows.index if rows.rows > 1 else None)


def _flat(tensor: torch.Tensor, entry_axis: int, channel_axes: Sequence[int]) -> torch.Tensor:
    between = [axis for axis in range(tensor.dim()) if axis != entry_axis and axis not in channel_axes]
    ordered = tensor.permute(entry_axis, *between, *channel_axes)
    positions = math.prod(tensor.shape[axis] for axis in between)
    return ordered.reshape(ordered.shape[0], positions, math.prod(tensor.shape[axis] for axis in channel_axes))


def number_positions(row_L: torch.Tensor, positions: int, rows: int) -> torch.Tensor:
    """Number the positions within each row over all of its entries, in order: int64 (L, S).

    >>> number_positions(torch.tensor([0, 1, 0]), 2, 2).tolist()
    [[0, 1], [0, 1], [2, 3]]
    """
    order = torch.argsort(row_L, stable=True)
    sorted_L = row_L[order]
    starts = torch.searchsorted(sorted_L, torch.arange(rows, device=row_L.device))
    nth = torch.empty_like(row_L)
    nth[order] = torch.arange(len(row_L), device=row_L.device) - starts[sorted_L]
    return nth[:, None] * positions + torch.arange(positions, device=row_L.device)
