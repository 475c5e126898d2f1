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


def cosine_blocks(left_GuD: torch.Tensor, right_GuD: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Cosines of each row of left with the other rows of right in its group, NaN with its own number.

    Yields a slice of all rows (in order, numbered over the groups) and their cosines with the u rows of the group.
    """
    units = left_GuD.shape[1]
    step = max(1, BLOCK_NUMBERS // units)
    for group, (left_uD, right_uD) in enumerate(zip(left_GuD, right_GuD, strict=True)):
        left_uD, right_uD = (rows / rows.norm(dim=-1, keepdim=True) for rows in (left_uD, right_uD))
        for start in range(0, units, step):
            cosines = (left_uD[start : start + step] @ right_uD.T).clamp(-1, 1)
            cosines.diagonal(start).fill_(torch.nan)
            yield slice(group * units + start, group * units + start + len(cosines)), cosines


@lru_cache(maxsize=16)
def permutations(entries: int, count: int) -> tuple[torch.Tensor, ...]:
    """Orders of 0 … entries − 1 drawn by hash: the same on every machine and in every version of torch."""
    entry_D = torch.arange(entries)
    return tuple(row_hash(entry_D, seed=seed).argsort(stable=True) for seed in range(count))
