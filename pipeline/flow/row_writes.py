"""How what is written into a tensor carries its rows there: by an index, or piece by piece through views.

Layer 1. An entry that nothing of the batch was written to is of no row: it goes with the others where those stand in
the rows' own order, else the rows are unknown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from pipeline.flow.row_joins import Source, Sources
from pipeline.flow.row_views import Arguments
from pipeline.flow.rows import Rows, Shape, agreed, along


def _index_put(given: Arguments, sources: Sources, new: Shape, part: int) -> Rows | None:
    used: dict[int, torch.Tensor] = {}
    axis = 0
    for index in given["indices"]:
        if index is None:
            axis += 1
            continue
        # a mask stands for an index of each of its axes
        for one in index.nonzero().unbind(1) if index.dtype in (torch.bool, torch.uint8) else [index]:
            used[axis] = one
            axis += 1
    replaces = not given.get("accumulate", False)
    return _put(sources, new, used, given["self"], given["values"], given["indices"], replaces=replaces)


def _index_copy(given: Arguments, sources: Sources, new: Shape, part: int) -> Rows | None:
    index = given["index"]
    used = {given["dim"] % len(new): index.reshape(-1)}
    return _put(sources, new, used, given["self"], given["source"], [index], replaces=True)


def _put(
    sources: Sources,
    new: Shape,
    used: Mapping[int, torch.Tensor],
    into: torch.Tensor,
    values: torch.Tensor,
    indices: Sequence[torch.Tensor | None],
    *,
    replaces: bool,
) -> Rows | None:
    """Rows of `into` with `values` at the indices of its `used` axes."""
    held, put = _held(sources, into), _held(sources, values)
    if put is None and held is not None:
        return held.rows
    axes = sorted(used)
    shape = torch.broadcast_shapes(*[index.shape for index in used.values()])
    if put is None:
        # numbers, at places that data chose
        put = next(source for source in sources if any(source.tensor is index for index in indices))
        behind = 0
    else:
        behind = len(new) - axes[-1] - 1
    rows = put.rows
    if rows is None or axes != list(range(axes[0], axes[-1] + 1)):
        return None
    of_entry = rows.of_entries(1 if rows.axis is None else put.shape[rows.axis])
    if rows.axis is None or bool((of_entry == of_entry[:1]).all()):
        # torch also strips axes of one entry from the values
        of_index = of_entry[:1].expand(shape)
    else:
        # counted from the last axis, by which the values are broadcast
        last = len(put.shape) - 1 - rows.axis
        if not behind <= last < behind + len(shape):
            found = rows.at(len(new) - 1 - last if last < behind else len(new) - 1 - last + len(shape) - len(axes))
            return found if held is None else None if held.rows is None else agreed([held.rows, found])
        of_index = of_entry.view(-1, *[1] * (last - behind)).expand(shape)
    for axis in axes:
        index = used[axis].expand(shape).reshape(-1).cpu() % max(new[axis], 1)
        of_axis = _gathered(index, of_index.reshape(-1), new[axis], rows.rows)
        if of_axis is None:
            continue
        if held is not None:
            of_axis = _over(held, of_axis, axis, whole=replaces and len(axes) == 1)
        if of_axis is not None and (made := _completed(axis, of_axis, rows)):
            return made
    return None


def _held(sources: Sources, tensor: torch.Tensor) -> Source | None:
    return next((source for source in sources if source.tensor is tensor), None)


def _gathered(index: torch.Tensor, of_index: torch.Tensor, size: int, rows: int) -> torch.Tensor | None:
    """The row of each of `size` entries by what was put there, −1 where nothing was; None where rows meet."""
    low = torch.full((size,), rows, dtype=torch.int64).scatter_reduce_(0, index, of_index, "amin")
    high = torch.full((size,), -1, dtype=torch.int64).scatter_reduce_(0, index, of_index, "amax")
    return high if torch.equal(low[high >= 0], high[high >= 0]) else None


def _over(held: Source, of_axis: torch.Tensor, axis: int, *, whole: bool) -> torch.Tensor | None:
    """The row of each entry where data was before; `whole`: nothing of it stays in an entry that is written to."""
    touched = of_axis >= 0
    if whole and bool(touched.all()):
        return of_axis
    if held.rows is None or held.rows.axis != axis:
        return None
    before = held.rows.of_entries(len(of_axis))
    if not whole and not torch.equal(before[touched], of_axis[touched]):
        return None
    return of_axis.where(touched, before)


def _completed(axis: int, of_axis: torch.Tensor, rows: Rows) -> Rows | None:
    """Rows of an axis of which some entries are of no row (−1)."""
    touched = of_axis >= 0
    if bool(touched.all()):
        return along(axis, of_axis, rows.rows)
    size, nodes = len(of_axis), rows.chosen_from
    if nodes is not None and len(nodes) == size and torch.equal(nodes[touched], of_axis[touched]):
        return along(axis, nodes, rows.rows)
    own = Rows(axis, rows.rows, max(size // rows.rows, 1))
    fits = size % rows.rows == 0 and torch.equal(own.of_entries(size)[touched], of_axis[touched])
    return own if fits else None


def _part_put(given: Arguments, sources: Sources, new: Shape, part: int) -> Rows | None:
    """A slice, or one entry along `dim`, put into a copy of a tensor."""
    dim = given.get("dim", 0) % len(new)
    held, put = _held(sources, given["self"]), _held(sources, given["src"])
    found = [source.rows for source in (held, put) if source is not None]
    if any(rows is None or rows.axis is None for rows in found):
        return None
    if put is not None and put.rows is not None and len(put.shape) < len(new):
        found[-1] = put.rows.at((put.rows.axis or 0) + ((put.rows.axis or 0) >= dim))
    same = agreed([rows for rows in found if rows is not None])
    return None if same is None or (same.axis == dim and put is not None) else same


def _masked_scatter(given: Arguments, sources: Sources, new: Shape, part: int) -> Rows | None:
    """Values put one after the other where a mask is true: known where each stands in the row that it is of."""
    held, put = _held(sources, given["self"]), _held(sources, given["source"])
    if held is None or held.rows is None or held.rows.axis is None or put is None:
        return None if held is None or put is not None else held.rows
    if put.rows is None or len(held.shape) != len(new):
        return None
    mask, size = given["mask"].expand(tuple(new)), 1
    # a mask of positions is the same for all numbers of one
    while mask.ndim - 1 > held.rows.axis and mask.stride(-1) == 0:
        mask, size = mask[..., 0], size * mask.shape[-1]
    places = mask.nonzero()[:, held.rows.axis].cpu()
    inner = len(put.shape) if put.rows.axis is None else len(put.shape) - put.rows.axis - 1
    of_axis = put.rows.of_entries(1 if put.rows.axis is None else put.shape[put.rows.axis])
    below = math.prod(put.shape[len(put.shape) - inner :])
    number = torch.arange(len(places)) * size
    of_value = of_axis[number // max(below, 1) % len(of_axis)]
    fits = (size == 1 or below % size == 0) and torch.equal(held.rows.of_entries(new[held.rows.axis])[places], of_value)
    return held.rows if fits else None


PUTS: dict[str, Callable[[Arguments, Sources, Shape, int], Rows | None]] = {
    "index_put": _index_put,
    "index_copy": _index_copy,
    "masked_scatter": _masked_scatter,
    "slice_scatter": _part_put,
    "select_scatter": _part_put,
}


class Place(NamedTuple):
    """Where a tensor stands in its memory."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def place_of(tensor: torch.Tensor) -> Place | None:
    """Where a tensor stands in its memory; None where it has no plain one."""
    if tensor.layout is not torch.strided:
        return None
    return Place(int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride())


class Piece(NamedTuple):
    """What was written through one view: its rows, and where that stands."""

    rows: Rows | None
    place: Place | None


def rows_of_pieces(pieces: Sequence[Piece], place: Place | None) -> Rows | None:
    """Rows of a tensor whose memory held no data before the pieces; None where they do not tell."""
    if place is None or any(piece.rows is None for piece in pieces):
        return None
    spots = [_spot(piece, place) for piece in pieces]
    known = [spot for spot in spots if spot is not None]
    if not known or len(known) < len(spots):
        return None
    made = [rows for axis in range(len(place.shape)) if (rows := _pieced(known, axis, place.shape[axis])) is not None]
    if own := next((rows for rows in made if rows.index is None), None):
        return own
    if all(spot.rows.axis is None for spot in known) and (one := agreed([spot.rows for spot in known])):
        return one
    return next(iter(made), None)


class _Spot(NamedTuple):
    """A piece within a tensor: the entries that it takes along each axis, and which axis its rows lie along."""

    rows: Rows
    entries: tuple[range, ...]
    dim: int | None


def _spot(piece: Piece, base: Place) -> _Spot | None:
    rows, view = piece.rows, piece.place
    order = sorted((axis for axis, size in enumerate(base.shape) if size > 1), key=lambda axis: -base.strides[axis])
    if rows is None or view is None or view.offset < base.offset or not _nested(base, order):
        return None
    rest = view.offset - base.offset
    entries = [range(1)] * len(base.shape)
    for axis in order:
        first, rest = divmod(rest, base.strides[axis])
        entries[axis] = range(first, first + 1)
    dim = None
    for own, (size, stride) in enumerate(zip(view.shape, view.strides, strict=True)):
        if size == 1:
            continue
        fitting = [axis for axis in order if stride >= base.strides[axis] and stride % base.strides[axis] == 0]
        if not fitting or len(entries[fitting[0]]) > 1:
            return None
        step, first = stride // base.strides[fitting[0]], entries[fitting[0]].start
        entries[fitting[0]] = range(first, first + step * size, step)
        dim = fitting[0] if own == rows.axis else dim
    if rest or any(taken[-1:] and taken[-1] >= size for taken, size in zip(entries, base.shape, strict=True)):
        return None
    return _Spot(rows, tuple(entries), dim)


def _nested(base: Place, order: Sequence[int]) -> bool:
    """Whether no two elements of a tensor are the same memory, each axis within a step of the one before."""
    strides, shape = base.strides, base.shape
    within = all(strides[outer] >= strides[inner] * shape[inner] for outer, inner in pairwise(order))
    return within and all(strides[axis] > 0 for axis in order)


def _pieced(spots: Sequence[_Spot], axis: int, size: int) -> Rows | None:
    of_axis = torch.full((size,), -1, dtype=torch.int64)
    for spot in spots:
        if spot.dim not in (None, axis):
            return None
        taken = torch.tensor([*spot.entries[axis]], dtype=torch.int64)
        row = spot.rows.of_entries(len(taken) if spot.dim == axis else 1).expand(len(taken))
        before = of_axis[taken]
        if not torch.equal(before.where(before >= 0, row), row):
            return None
        of_axis[taken] = row
    return _completed(axis, of_axis, spots[0].rows)
