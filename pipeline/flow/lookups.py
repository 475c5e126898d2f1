"""Embeddings as what they are: products of a table with one-hot or multi-hot vectors, never written out.

Layer 1. A lookup stays beside the values that hold its vectors while they are joined, weighted and reshaped; whatever
chooses among them ends it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, eq=False)
class Block:
    """The part of x that meets one table: `index` of the ones (or of `value`s), or a `value` for every row of it."""

    key: int
    table: torch.Tensor
    names: frozenset[str]
    index: torch.Tensor | None
    value: torch.Tensor | None

    def weighted(self, weight: torch.Tensor) -> Block:
        """The same with every entry multiplied."""
        return replace(self, value=weight if self.value is None else self.value * weight)


Lookup = tuple[Block, ...]


def key_of_lookup(lookup: Lookup) -> int:
    """The same for the same tables in the same order."""
    return hash(tuple(block.key for block in lookup))


def table_of(lookup: Lookup) -> torch.Tensor:
    """All tables below one another, (D, k)."""
    return torch.cat([block.table for block in lookup])


def entries_of(lookup: Lookup, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The nonzero entries of x (N, D) as (row, input, value), each pair of row and input once."""
    parts, start = [], 0
    for block in lookup:
        size = len(block.table)
        device = block.table.device
        if block.index is None:
            assert block.value is not None
            value = block.value.reshape(rows, -1)
            index = torch.arange(size, device=device).expand(rows, size)
        else:
            index = block.index.reshape(rows, -1).long()
            value = torch.ones_like(index, dtype=block.table.dtype)
            if block.value is not None:
                value = block.value.reshape(rows, -1).expand_as(index)
        row = torch.arange(rows, device=device)[:, None].expand_as(index)
        parts.append((row.reshape(-1), index.reshape(-1) + start, value.reshape(-1)))
        start += size
    row, index, value = (torch.cat(part) for part in zip(*parts, strict=True))
    place, inverse = torch.unique(row * start + index, return_inverse=True)
    total = torch.zeros(len(place), dtype=value.dtype, device=value.device).index_add_(0, inverse, value)
    return place // start, place % start, total


def is_complete(lookup: Sequence[Block], rows: int) -> bool:
    """Whether every block has its rows first, so that entries can be told by row."""
    tensors = [block.index if block.index is not None else block.value for block in lookup]
    return all(tensor is not None and tensor.dim() > 0 and tensor.shape[0] == rows for tensor in tensors)
