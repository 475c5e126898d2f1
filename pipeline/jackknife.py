"""Standard errors from the states that are stored anyway: leave one chunk out, see how far the number moves.

Layer 3: pure. Rows inside a chunk need not be independent of each other (frames of a video, pixels of an image): the
chunk is the unit that is left out. With more than BLOCKS chunks, consecutive ones are left out together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from pipeline.contracts import asking_of
from pipeline.errors import ContractError
from pipeline.kernels.base import State
from pipeline.sites import Site
from pipeline.statistics.base import Controls, Nullable, Statistic

# leave-one-out states that are held at a time, and evaluations of every column that asks for an error
BLOCKS = 10


@dataclass(frozen=True, eq=False)
class Block:
    """The merged state of consecutive chunks and the rows that were read in them."""

    state: State
    rows: int


def block_of(index: int, chunks: int) -> int:
    """The block that a chunk belongs to: equal runs of consecutive chunks, at most BLOCKS of them."""
    return index * min(BLOCKS, chunks) // chunks


def standard_errors(
    statistic: Statistic, site: Site, blocks: Sequence[Block], whole: State, controls: Controls
) -> dict[str, torch.Tensor]:
    """Delete-a-group jackknife of the columns that ask for it, as `<column>_se`; none with fewer than two blocks.

    Blocks may differ in size: Busing, Meijer & van der Leeden 1999, eq. 5 (with equal ones it is Efron & Stein's).
    A unit for which any evaluation is undefined has NaN. ContractError unless the statistic estimates each unit.
    """
    wanted = [column.name for column in statistic.COLUMNS if column.se]
    filled = [block for block in blocks if block.rows > 0]
    if not wanted or len(filled) < 2:
        return {}
    total = sum(block.rows for block in filled)
    estimate = _values(statistic, site, whole, controls, wanted)
    without = [_values(statistic, site, state, controls, wanted) for state in _left_out(statistic, site, filled)]
    shares = torch.tensor([total / block.rows for block in filled], dtype=torch.float64)[:, None]
    errors = {}
    for name, value_U in estimate.items():
        deleted_KU = torch.stack([one[name] for one in without])
        errors[f"{name}_se"] = _deviation(value_U, deleted_KU, shares)
    return errors


def _deviation(value_U: torch.Tensor, deleted_KU: torch.Tensor, share_K1: torch.Tensor) -> torch.Tensor:
    pseudo_KU = share_K1 * value_U - (share_K1 - 1) * deleted_KU
    mean_U = (pseudo_KU / share_K1).sum(0)
    return ((pseudo_KU - mean_U).square() / (share_K1 - 1)).mean(0).sqrt()


def _left_out(statistic: Statistic, site: Site, blocks: Sequence[Block]) -> Iterator[State]:
    """For each block the state of all others, by prefix and suffix merges; of the prefixes one is held at a time."""

    def merge(left: State, right: State) -> State:
        with asking_of(statistic, "merge()", site):
            return statistic.merge(site, left, right)

    empty = statistic.empty(site)
    states = [block.state for block in blocks]
    before = accumulate(states[:-1], merge, initial=empty)
    after = list(accumulate(reversed(states[1:]), lambda right, left: merge(left, right), initial=empty))[::-1]
    return (merge(left, right) for left, right in zip(before, after, strict=True))


def _values(
    statistic: Statistic, site: Site, state: State, controls: Controls, wanted: Sequence[str]
) -> dict[str, torch.Tensor]:
    with asking_of(statistic, "estimates()", site):
        row: Any = statistic.estimates(site, state, controls)
        found = {name: _numbers(row[name]) for name in wanted if name in row}
    for name, value_U in found.items():
        if value_U.shape != (site.units,):
            raise ContractError(
                f"statistic {statistic.name} at site {site.name}: estimates() gives {name} of shape "
                f"{tuple(value_U.shape)}; expected {(site.units,)}, one value for each unit"
            )
    return found


def _numbers(values: Any) -> torch.Tensor:
    if isinstance(values, Nullable):
        return torch.where(values.valid, values.values.double(), torch.nan)
    return torch.as_tensor(values, dtype=torch.float64)
