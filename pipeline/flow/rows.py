"""Which axis of a tensor carries the rows of the batch, and which row each entry along it belongs to.

Layer 1. `row_rules` follows it through the operations of a forward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

Shape = Sequence[int]
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Entry i along `axis` belongs to row (i // inner) % rows, or to row `index[i]` where an index is kept.

    With `axis` None the whole tensor belongs to one row: the one in `index`. `chosen_from` are the rows of what the
    entries were chosen from (the nodes of a message), if they were.
    """

    axis: int | None
    rows: int
    inner: int = 1
    index: torch.Tensor | None = None
    chosen_from: torch.Tensor | None = None

    def of_entries(self, size: int, device: torch.device = CPU) -> torch.Tensor:
        """The row of each of the `size` entries along the axis, int64."""
        if self.axis is None:
            return self.one().expand(size).to(device)
        if self.index is not None:
            return self.index.to(device)
        return torch.arange(size, device=device) // self.inner % self.rows

    def one(self) -> torch.Tensor:
        """The row that the whole tensor belongs to, int64 of one element."""
        return torch.zeros(1, dtype=torch.int64) if self.index is None else self.index.cpu()

    def at(self, axis: int) -> Rows:
        """The same rows, carried by another axis."""
        return replace(self, axis=axis)


def whole(row: int | torch.Tensor, rows: int) -> Rows:
    """Everything belongs to one row."""
    index = torch.tensor([row]) if isinstance(row, int) else row.reshape(1)
    return Rows(None, rows, index=index)


def along(axis: int, index: torch.Tensor, rows: int) -> Rows:
    """Rows by an explicit index; in their own order, each as often as the others, where the index is just that."""
    if rows and len(index) and len(index) % rows == 0:
        own = Rows(axis, rows, len(index) // rows)
        if torch.equal(index.cpu(), own.of_entries(len(index))):
            return own
    return Rows(axis, rows, index=index)


def chosen(rows: Rows, size: int, index: torch.Tensor, axis: int) -> Rows:
    """The rows of entries chosen by an index from an axis of `size` entries."""
    of_entry = rows.of_entries(size)
    return replace(along(axis, of_entry[index.cpu()], rows.rows), chosen_from=of_entry)


def of_leaf(shape: Shape, rows: int, preferred: int | None = None) -> Rows | None:
    """Rows of an input tensor: its axis of `rows` entries, the first if that is one, unless a probe knew better."""
    if rows == 1:
        return whole(0, 1)
    if preferred is not None and preferred < len(shape) and shape[preferred] == rows:
        return Rows(preferred, rows)
    if shape and shape[0] == rows:
        return Rows(0, rows)
    axes = [axis for axis, size in enumerate(shape) if size == rows]
    return Rows(axes[0], rows) if len(axes) == 1 else None


def agreed(candidates: Sequence[Rows]) -> Rows | None:
    """The rows that all candidates name; None if they differ."""
    if not candidates:
        return None
    first = candidates[0]
    for other in candidates[1:]:
        same = (other.axis, other.inner) == (first.axis, first.inner)
        if not same:
            return None
        if not _same_index(first.index, other.index):
            return None
    return next((one for one in candidates if one.chosen_from is not None), first)


def _same_index(left: torch.Tensor | None, right: torch.Tensor | None) -> bool:
    if left is None or right is None or left is right:
        return left is right
    return left.shape == right.shape and torch.equal(left.cpu(), right.cpu())


def reshaped(rows: Rows, old: Shape, new: Shape) -> Rows | None:
    """Follow a reshape: elements keep their row-major order, so along some axis the rows recur with the same period.

    >>> reshaped(Rows(0, 4), (4, 3, 2), (12, 2))
    Rows(axis=0, rows=4, inner=3, index=None, chosen_from=None)
    """
    if rows.axis is None:
        return rows
    if math.prod(old) == 0:
        return rows if len(new) > rows.axis and new[rows.axis] == old[rows.axis] else None
    entry = math.prod(old[rows.axis + 1 :])
    block = entry if rows.index is not None else rows.inner * entry
    period = old[rows.axis] * entry if rows.index is not None else rows.rows * block
    trailing = math.prod(new)
    for axis, length in enumerate(new):
        trailing //= length
        if block % trailing == 0 and (length * trailing) % period == 0:
            inner = block // trailing
            if rows.index is None:
                return Rows(axis, rows.rows, inner)
            index = rows.index.repeat_interleave(inner).repeat(length * trailing // period)
            return along(axis, index, rows.rows)
    return _split(rows, old, new, entry) if rows.index is not None else None


def _split(rows: Rows, old: Shape, new: Shape, entry: int) -> Rows | None:
    # an axis with an index is split: one of the new axes carries the rows if the others do not change them
    index = rows.of_entries(old[rows.axis or 0])
    trailing = math.prod(new)
    for axis, length in enumerate(new):
        trailing //= length
        if trailing % entry or len(index) % (trailing // entry * length):
            continue
        parts = index.view(-1, length, trailing // entry)
        if bool((parts == parts[:1, :, :1]).all()):
            return along(axis, parts[0, :, 0], rows.rows)
    return None
