"""For every row and unit the one presentation that stands for the row: the greatest of some value, first of equals.

Layer 1: pure torch, no I/O. Invariant: which presentation is chosen depends on the row alone, never on the order or
grouping of the batch, also where one row's entries are spread over it.

Shapes: L entries, S positions, U units, N rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from pipeline.sites import Presentations

_LAST = torch.iinfo(torch.int64).max


class Places(NamedTuple):
    """Of every row and unit: the greatest value, and the entry and position index where it stands.

    The value is −inf where the row has no candidate; the indices are then 0.
    """

    value_NU: torch.Tensor
    entry_NU: torch.Tensor
    index_NU: torch.Tensor

    @property
    def found_NU(self) -> torch.Tensor:
        """Whether the row has a candidate."""
        return self.value_NU > -torch.inf

    def of(self, value_LSU: torch.Tensor) -> torch.Tensor:
        """Another value at the same places."""
        units_U = torch.arange(value_LSU.shape[2], device=value_LSU.device)
        return value_LSU[self.entry_NU, self.index_NU, units_U]


def greatest_by_row(presentations: Presentations, value_LSU: torch.Tensor) -> torch.Tensor:
    """The greatest value of each row and unit; −inf (no candidate) for a row without presentations."""
    value_LU = value_LSU.amax(1) if presentations.positions else _no_candidate_LU(value_LSU)
    return by_row(presentations, value_LU)


def greatest_places(presentations: Presentations, value_LSU: torch.Tensor) -> Places:
    """Where each row's greatest value stands, of equals the smallest position; −inf is no candidate."""
    return places_of(presentations, *_in_entry(presentations, value_LSU))


def places_of(presentations: Presentations, value_LU: torch.Tensor, index_LU: torch.Tensor) -> Places:
    """Where each row's greatest value stands, from the greatest of each entry and its position index."""
    value_NU = by_row(presentations, value_LU)
    entry_L1 = torch.arange(presentations.entries, device=value_LU.device)[:, None]
    if presentations.row_L is None:
        return Places(value_NU, entry_L1.expand_as(value_NU), index_LU)
    entry_NU = _first_entry(presentations, value_LU, value_NU, position_at(presentations, entry_L1, index_LU))
    index_NU = index_LU.gather(0, entry_NU) if presentations.entries else torch.zeros_like(entry_NU)
    return Places(value_NU, entry_NU, index_NU)


def position_at(presentations: Presentations, entry: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The number within its row of the presentation at (entry, position index)."""
    return index if presentations.position_LS is None else presentations.position_LS[entry, index]


def _no_candidate_LU(value_LSU: torch.Tensor) -> torch.Tensor:
    return value_LSU.new_full((value_LSU.shape[0], value_LSU.shape[2]), -torch.inf)


def _in_entry(presentations: Presentations, value_LSU: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The greatest value of each entry and its position index."""
    if not presentations.positions:
        nothing_LU = _no_candidate_LU(value_LSU)
        return nothing_LU, torch.zeros_like(nothing_LU, dtype=torch.int64)
    if presentations.position_LS is None:
        # torch.max documents the index of the first of equals; torch.topk promises nothing
        greatest = value_LSU.max(1)
        return greatest.values, greatest.indices
    value_LU = value_LSU.amax(1)
    position_LSU = presentations.position_LS[:, :, None].expand_as(value_LSU)
    return value_LU, position_LSU.masked_fill(value_LSU != value_LU[:, None], _LAST).min(1).indices


def by_row(presentations: Presentations, value_LU: torch.Tensor) -> torch.Tensor:
    """The greatest value of each row, from the greatest of each entry; −inf where it has none."""
    if presentations.row_L is None:
        return value_LU
    start_NU = value_LU.new_full((presentations.rows, value_LU.shape[1]), -torch.inf)
    return start_NU.scatter_reduce(0, presentations.row_L[:, None].expand_as(value_LU), value_LU, "amax")


def _first_entry(
    presentations: Presentations, value_LU: torch.Tensor, value_NU: torch.Tensor, position_LU: torch.Tensor
) -> torch.Tensor:
    """Of the entries that hold their row's greatest value the one with the smallest position; 0 where none does."""
    row_L = presentations.row_index_L
    row_LU = row_L[:, None].expand_as(value_LU)
    last_NU = torch.full_like(value_NU, _LAST, dtype=torch.int64)
    candidate_LU = (value_LU == value_NU[row_L]) & (value_LU > -torch.inf)
    position_LU = position_LU.masked_fill(~candidate_LU, _LAST)
    position_NU = last_NU.scatter_reduce(0, row_LU, position_LU, "amin")
    candidate_LU &= position_LU == position_NU[row_L]
    entry_LU = torch.arange(presentations.entries, device=row_L.device)[:, None].expand_as(value_LU)
    entry_NU = last_NU.scatter_reduce(0, row_LU, entry_LU.masked_fill(~candidate_LU, _LAST), "amin")
    return entry_NU.masked_fill(entry_NU == _LAST, 0)
