"""The cells of one statistic merged in plan order, of some sites at a time: whole, and in the blocks of the jackknife.

Layer 3. What is held is bounded by the states of a few sites, whatever the size of the model and the number of its
chunks: of an object with more than these only their bytes are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from pipeline.cell_parts import CellParts, Units
from pipeline.cells import CellState, cell_key, decode_cell, misfit
from pipeline.contracts import asking_of
from pipeline.errors import SpoiltObject
from pipeline.flow.discover import Discovery
from pipeline.hashing import sha256
from pipeline.jackknife import Block, block_of
from pipeline.kernels.base import State
from pipeline.models.base import checkpoint_key
from pipeline.scores import Sums, added
from pipeline.sites import Site
from pipeline.sources.base import Chunk
from pipeline.statistics.base import Statistic, primitives_digest
from pipeline.store import Store

# of the states of one chunk, all statistics together: the jackknife holds some thirty times as much of one of these
GROUP_BYTES = 32 << 20


@dataclass(frozen=True)
class Cells:
    """The cells of one model and statistic on the chunks of a split.

    checkpoint  SHA-256 of the model's weights, as stored
    state_name  the folder of the statistic's states
    opened      where everything of a site is in them, by key, while its parts are read one after the other
    """

    model: str
    checkpoint: str
    statistic: Statistic
    state_name: str
    chunks: Sequence[Chunk]
    opened: dict[str, CellParts] | None = None


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


class Group(NamedTuple):
    """Sites that are reduced together, and the bytes of all their states of one chunk."""

    sites: tuple[Site, ...] = ()
    bytes: int = 0

    @property
    def is_wide(self) -> bool:
        """Whether the states are not small: then they are of one site."""
        return self.bytes > GROUP_BYTES


def grouped_sites(found: Discovery, statistics: Sequence[Statistic], classes: int) -> list[Group]:
    """The sites in order of their names, in groups whose states are small, or that are of one site."""
    groups = [Group()]
    for site in sorted(found.sites, key=lambda one: one.name):
        size = sum(one.state_bytes(site, classes) for one in statistics if one.applies(site))
        if groups[-1].sites and groups[-1].bytes + size > GROUP_BYTES:
            groups.append(Group())
        groups[-1] = Group((*groups[-1].sites, site), groups[-1].bytes + size)
    return groups


@dataclass
class Reading:
    """The cells of one model on a split as they are merged, and what they say of their chunks, each asked once.

    sites  all that the model has
    """

    sites: Sequence[Site]
    store: Store
    receipts: list[dict[str, Any]]
    scores: Sums = field(default_factory=dict)
    damage: list[dict[str, Any]] = field(default_factory=list)
    _hashed: set[str] = field(default_factory=set)

    def merged(self, cells: Cells, sites: Sequence[Site]) -> Merged:
        """The merged states of those of the sites, or parts of them, at which the statistic applies."""
        statistic = cells.statistic
        every, some = ([site for site in those if statistic.applies(site)] for those in (self.sites, sites))
        is_first = statistic.name not in self._hashed
        found = merged(cells, some, self.store, every=every, is_first=is_first)
        if is_first:
            self._hashed.add(statistic.name)
            self.receipts += found.receipts
            self.scores, self.damage = added(found.scores), found.damage
        return found


def merged(cells: Cells, sites: Sequence[Site], store: Store, *, every: Sequence[Site], is_first: bool) -> Merged:
    """Merge the states of some of the sites that the statistic has (`every`), or of a part of one of them.

    Receipts are made where `is_first`: an object is hashed once. SpoiltObject if a cell is of other sites or weights.
    """
    statistic = cells.statistic
    # a statistic that none of these sites has is read for its receipts alone
    chunks = cells.chunks if sites or is_first else ()
    keeps_blocks = any(column.se for column in statistic.COLUMNS)
    empty = {site.name: statistic.empty(site) for site in sites}
    primitives = primitives_digest(statistic, every) if is_first else None
    found = Merged(empty, [], [], [], [])
    for index, chunk in enumerate(chunks):
        key = cell_key(cells.model, cells.state_name, chunk.id)
        is_all = len(sites) == len(every) and not any(site.whole for site in sites)
        stored = _whole(key, store) if is_all else _part(cells, key, sites, store, is_hashed=is_first)
        cell = stored.cell
        _refuse_misfit(cell, key, cells, every, primitives)
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


def _part(cells: Cells, key: str, sites: Sequence[Site], store: Store, *, is_hashed: bool) -> _Stored:
    wanted = {site.name: _units_of(site) for site in sites}
    parts = (cells.opened or {}).get(key) or CellParts.opened(partial(store.get_range, key), key=key)
    if cells.opened is not None:
        cells.opened[key] = parts.only(wanted)
    cell = decode_cell(parts.of(wanted), key=key)
    return _Stored(cell, key, parts.sha256() if is_hashed else "", parts.size)


def _units_of(site: Site) -> Units | None:
    return Units(site.first, site.first + site.units, site.whole.units) if site.whole else None


def _refuse_misfit(cell: CellState, key: str, cells: Cells, every: Sequence[Site], primitives: str | None) -> None:
    """SpoiltObject unless a cell is of the stored weights, of the sites that they have, and of primitives if given."""
    if cell.checkpoint != cells.checkpoint:
        raise SpoiltObject(
            f"{key} was measured on other weights (SHA-256 {cell.checkpoint[:12]}…) than {checkpoint_key(cells.model)} "
            f"holds ({cells.checkpoint[:12]}…), which was made anew since: delete what is below states/{cells.model}/ "
            "and run again"
        )
    if cell.states.keys() != {site.name for site in every}:
        raise SpoiltObject(f"{key} holds other sites than the model has; delete it and run again")
    if primitives not in (None, cell.primitives):
        name, version = cells.statistic.name, cells.statistic.version
        raise SpoiltObject(
            f"{key} was measured when {name} needed other primitives: raise its version ({version}), which names its "
            f"states, or, if it is again what it was, delete what is below {key.rpartition('/')[0]}/, and run again"
        )


def _refuse_other_kinds(statistic: Statistic, site: Site, state: State, empty: State, key: str) -> None:
    """SpoiltObject unless a state is one that the statistic can have of the site."""
    # its other forms are as large as itself, and rare: they are made where they are needed
    if misfit(state, empty) and (wrong := misfit(state, *statistic.forms(site))):
        raise SpoiltObject(f"{key}: {site.name} {wrong}; delete it and run again")


def _merge(
    statistic: Statistic, sites: Sequence[Site], left: Mapping[str, State], right: Mapping[str, State]
) -> dict[str, State]:
    merged = {}
    for site in sites:
        with asking_of(statistic, "merge()", site):
            merged[site.name] = statistic.merge(site, left[site.name], right[site.name])
    return merged


def _receipt(statistic: Statistic, chunk: Chunk, stored: _Stored) -> dict[str, Any]:
    rows = stored.cell.rows
    return {
        "chunk": chunk.id,
        "statistic": statistic.name,
        "file": chunk.url,
        "first_row": chunk.first_row,
        "key": stored.key,
        "rows": rows.read,
        "unreadable": rows.unreadable,
        "excluded": rows.excluded,
        "total": rows.total,
        "bytes": stored.bytes,
        "sha256": stored.sha256,
        "device": stored.cell.device,
    }
