"""The cells of one statistic merged in plan order, of some sites at a time: whole, and in the blocks of the jackknife.

Layer 3. What is held is bounded by the states of a few sites, whatever the size of the model and the number of its
chunks: of an object with more than these only their bytes are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from pipeline.cell_parts import CellParts
from pipeline.cells import CellState, cell_key, decode_cell, misfit
from pipeline.errors import SpoiltObject
from pipeline.flow.discover import Discovery
from pipeline.hashing import sha256
from pipeline.jackknife import Block, block_of
from pipeline.kernels.base import State
from pipeline.models.base import checkpoint_key
from pipeline.scores import Sums
from pipeline.sites import Site
from pipeline.sources.base import Chunk
from pipeline.statistics.base import Statistic
from pipeline.store import Store

# of the states of one chunk, all statistics together: the jackknife holds some thirty times as much of one of these
GROUP_BYTES = 32 << 20


@dataclass(frozen=True)
class Cells:
    """The cells of one model and statistic on the chunks of a split.

    checkpoint  SHA-256 of the model's weights, as stored
    state_name  the folder of the statistic's states
    """

    model: str
    checkpoint: str
    statistic: Statistic
    state_name: str
    chunks: Sequence[Chunk]


@dataclass(frozen=True, eq=False)
class Merged:
    """The merged states of some sites, their blocks with rows, and what every cell says of its chunk."""

    states: dict[str, State]
    blocks: list[tuple[dict[str, State], int]]
    scores: list[Sums]
    receipts: list[dict[str, Any]]
    damage: list[dict[str, Any]]

    def blocks_of(self, site: Site) -> list[Block]:
        """The blocks of one site."""
        return [Block(states[site.name], rows) for states, rows in self.blocks]


def grouped_sites(found: Discovery, statistics: Sequence[Statistic], classes: int) -> list[tuple[Site, ...]]:
    """The sites in order of their names, in groups whose states are small, or that are of one site."""
    groups: list[list[Site]] = [[]]
    filled = 0
    for site in sorted(found.sites, key=lambda one: one.name):
        size = sum(one.state_bytes(site, classes) for one in statistics if one.applies(site))
        if groups[-1] and filled + size > GROUP_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(site)
        filled += size
    return [tuple(group) for group in groups]


def merged(cells: Cells, sites: Sequence[Site], store: Store, *, every: Sequence[Site], is_first: bool) -> Merged:
    """Merge the states of some of the sites that the statistic has (`every`).

    Receipts are made where `is_first`: an object is hashed once. SpoiltObject if a cell is of other sites or weights.
    """
    statistic = cells.statistic
    # a statistic that none of these sites has is read for its receipts alone
    chunks = cells.chunks if sites or is_first else ()
    keeps_blocks = any(column.se for column in statistic.COLUMNS)
    empty = {site.name: statistic.empty(site) for site in sites}
    found = Merged(empty, [], [], [], [])
    for index, chunk in enumerate(chunks):
        key = cell_key(cells.model, cells.state_name, chunk.id)
        stored = _whole(key, store) if len(sites) == len(every) else _part(key, sites, store, is_hashed=is_first)
        cell = stored.cell
        _refuse_misfit(cell, key, cells, every)
        for site in sites:
            _refuse_other_kinds(statistic, site, cell.states[site.name], empty[site.name], key)
        found.states.update(_merge(statistic, sites, found.states, cell.states))
        if keeps_blocks and block_of(index, len(chunks)) == len(found.blocks):
            found.blocks.append(({site.name: cell.states[site.name] for site in sites}, cell.rows.read))
        elif keeps_blocks:
            states, rows = found.blocks[-1]
            found.blocks[-1] = (_merge(statistic, sites, states, cell.states), rows + cell.rows.read)
        if is_first:
            found.scores.append(dict(cell.scores))
            found.receipts.append(_receipt(statistic, chunk, stored))
            found.damage.extend({"chunk": chunk.id, "file": chunk.url, **one._asdict()} for one in cell.damage)
    return found


class _Stored(NamedTuple):
    """A cell, or some sites of one, and the object that it was read from; without a hash if it was not asked for."""

    cell: CellState
    key: str
    sha256: str
    bytes: int


def _whole(key: str, store: Store) -> _Stored:
    content = store.get(key)
    return _Stored(decode_cell(content, key=key), key, sha256(content), len(content))


def _part(key: str, sites: Sequence[Site], store: Store, *, is_hashed: bool) -> _Stored:
    parts = CellParts.opened(partial(store.get_range, key), key=key)
    cell = decode_cell(parts.of({site.name for site in sites}), key=key)
    return _Stored(cell, key, parts.sha256() if is_hashed else "", parts.bytes)


def _refuse_misfit(cell: CellState, key: str, cells: Cells, every: Sequence[Site]) -> None:
    """SpoiltObject unless a cell is of the weights that are stored, and of the sites that they have."""
    if cell.checkpoint != cells.checkpoint:
        raise SpoiltObject(
            f"{key} was measured on other weights (SHA-256 {cell.checkpoint[:12]}…) than {checkpoint_key(cells.model)} "
            f"holds ({cells.checkpoint[:12]}…), which was made anew since: delete what is below states/{cells.model}/ "
            "and run again"
        )
    if cell.states.keys() != {site.name for site in every}:
        raise SpoiltObject(f"{key} holds other sites than the model has; delete it and run again")


def _refuse_other_kinds(statistic: Statistic, site: Site, state: State, empty: State, key: str) -> None:
    """SpoiltObject unless a state is one that the statistic can have of the site."""
    # its other forms are as large as itself, and rare: they are made where they are needed
    if misfit(state, empty) and (wrong := misfit(state, *statistic.forms(site))):
        raise SpoiltObject(f"{key}: {site.name} {wrong}; delete it and run again")


def _merge(
    statistic: Statistic, sites: Sequence[Site], left: Mapping[str, State], right: Mapping[str, State]
) -> dict[str, State]:
    return {site.name: statistic.merge(site, left[site.name], right[site.name]) for site in sites}


def _receipt(statistic: Statistic, chunk: Chunk, stored: _Stored) -> dict[str, Any]:
    rows = stored.cell.rows
    return {
        "chunk": chunk.id,
        "statistic": statistic.name,
        "file": chunk.url,
        "key": stored.key,
        "rows": rows.read,
        "unreadable": rows.unreadable,
        "excluded": rows.excluded,
        "total": rows.total,
        "bytes": stored.bytes,
        "sha256": stored.sha256,
        "device": stored.cell.device,
    }
