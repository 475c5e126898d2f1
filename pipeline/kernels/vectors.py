"""Cosines between patterns, and the order in which a pattern's entries are permuted as a control.

Layer 1: pure torch, no I/O; float64 in, float64 out. A cosine with a zero vector is NaN (undefined).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch

from pipeline.hashing import row_hash

# numbers in a block of cosines, 32 MiB of float64
BLOCK_NUMBERS = 1 << 22
# cosines that differ by less are one cosine: blocked matrix products round differently for equal patterns
TIE = 2.0**-40


def cosine(left_UD: torch.Tensor, right_UD: torch.Tensor) -> torch.Tensor:
    """Cosine of each row of left with the same row of right, in [−1, 1]."""
    norms_U: torch.Tensor = left_UD.norm(dim=-1) * right_UD.norm(dim=-1)
    return ((left_UD * right_UD).sum(-1) / norms_U).clamp(-1, 1)


def block_rows(units: int) -> int:
    """Rows of a block of cosines with so many."""
    return max(1, BLOCK_NUMBERS // units)


def cosine_blocks(
    left_GuD: torch.Tensor, right_GuD: torch.Tensor, *, first: int = 0
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Cosines of each row of left with the other rows of right in its group, NaN with its own number.

    Yields a slice of all rows (in order, numbered over the groups) and their cosines with the u rows of the group. Left
    may be some rows of a single group, from number `first` on: of the same bits as all of them, where that begins a
    block.
    """
    rows, units = left_GuD.shape[1], right_GuD.shape[1]
    step = block_rows(units)
    for group, (left_uD, right_uD) in enumerate(zip(left_GuD, right_GuD, strict=True)):
        right_uD = _unit_length(right_uD)
        for start in range(0, rows, step):
            cosines = (_unit_length(left_uD[start : start + step]) @ right_uD.T).clamp(-1, 1)
            cosines.diagonal(first + start).fill_(torch.nan)
            yield slice(group * units + start, group * units + start + len(cosines)), cosines


def _unit_length(rows_UD: torch.Tensor) -> torch.Tensor:
    return rows_UD / rows_UD.norm(dim=-1, keepdim=True)


@lru_cache(maxsize=16)
def permutations(entries: int, count: int) -> tuple[torch.Tensor, ...]:
    """Orders of 0 … entries − 1 drawn by hash: the same on every machine and in every version of torch."""
    entry_D = torch.arange(entries)
    return tuple(row_hash(entry_D, seed=seed).argsort(stable=True) for seed in range(count))
