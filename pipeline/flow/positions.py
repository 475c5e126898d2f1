"""Which axis of a tensor counts the positions that a batch's labels, or its mask, name; followed as the rows are.

Layer 1. The axis is followed, never recognised by its size: a layer over the time axis may make as many numbers as
there are steps, or the channels be as many, and none of them is a step. A position keeps its number through all that
makes one of each: attention, a recurrent layer, a padded convolution, a causal one too. Where an operation leaves it
unclear the answer is None. An entry that is no position of the batch (padding, a class token) has the number −1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import torch

from pipeline.batch import Batch
from pipeline.flow.operators import BATCH_NORMS, CONVOLUTIONS, DATA_NORMS, DROPOUTS, ELEMENTWISE, POOLS, words
from pipeline.flow.row_joins import JOINS, REDUCTIONS, Source, Sources, reduced
from pipeline.flow.row_rules import follow
from pipeline.flow.row_views import KEEP_ALL, ONE, PARTS, Arguments, axis_of
from pipeline.flow.rows import Rows, Shape, agreed, along

# of each axis that counts positions, the outer first: which of them its entries are; without an axis, a single one
Places = tuple[Rows, ...]
# what holds data among the operands of an operation: its places, its shape before, itself
Operand = tuple[Places | None, Shape, torch.Tensor]


def positions_of(batch: Batch) -> int:
    """How many positions of a row have labels, or are masked; 0 where the batch has neither."""
    named_NS = batch.label_NS if batch.label_NS is not None else batch.mask_NS
    return 0 if named_NS is None else int(named_NS.shape[1])


def places_of_leaf(shape: Shape, rows: Rows | None, batch: Batch, *, first: bool) -> Places | None:
    """The axes of an input that count its positions: those that the batch says, or the only ones of that number."""
    positions = positions_of(batch)
    if rows is None or positions < 2:
        return None
    if first and batch.position_axes is not None:
        said = tuple(axis % len(shape) for axis in batch.position_axes)
        fitting = [said] if math.prod(shape[axis] for axis in said) == positions else []
    else:
        others = [axis for axis, size in enumerate(shape) if axis != rows.axis and size > 1]
        runs = [tuple(others[start:stop]) for start, stop in combinations(range(len(others) + 1), 2)]
        fitting = [run for run in runs if math.prod(shape[axis] for axis in run) == positions]
    return tuple(Rows(axis, shape[axis]) for axis in fitting[0]) if len(fitting) == 1 else None


def follow_places(name: str, given: Arguments, operands: Sequence[Operand], new: Shape, part: int = 0) -> Places | None:
    """The places of output `part` of operation `name`, of shape `new`; `given` are its arguments by name."""
    counted = {len(places) for places, *_ in operands if places is not None}
    if len(counted) != 1:
        return None
    found = []
    for number in range(counted.pop()):
        sources = [
            Source(None if places is None else places[number], shape, tensor) for places, shape, tensor in operands
        ]
        rows = _followed(name, given, sources, new, part)
        if rows is None:
            return None
        found.append(rows)
    return tuple(found)


def number_of_each(places: Places, shape: Shape) -> torch.Tensor:
    """The number of the position that each entry of a tensor of this shape is, of size 1 along other axes; −1: none."""
    number, known = torch.zeros([1] * len(shape), dtype=torch.int64), torch.ones([1] * len(shape), dtype=torch.bool)
    for rows in places:
        axis = axis_of(rows)
        of_axis = rows.of_entries(shape[axis]).view([-1 if at == axis else 1 for at in range(len(shape))])
        number, known = number * rows.rows + of_axis, known & (of_axis >= 0)
    return number.masked_fill(~known, -1)


def _followed(name: str, given: Arguments, sources: Sources, new: Shape, part: int) -> Rows | None:
    held = [source for source in sources if source.rows is not None]
    known = [source for source in held if _rows(source).axis is not None]
    if not known:
        # single positions, until they are put side by side
        same = agreed([_rows(source) for source in held])
        return follow(name, given, sources, new, part) if name == "stack" else same
    # a single one beside all of them (the last step added to each) is none of theirs
    sources = [source._replace(rows=None) if source.rows and source.rows.axis is None else source for source in sources]
    if name in JOINS:
        return _joined(given, known, new)
    if name in REDUCTIONS and (given.get("dim") is not None or len(new) < len(known[0].shape)):
        return reduced(_rows(known[0]), given, known[0].shape, new)
    if name in ELEMENTWISE:
        return _elementwise(known, new)
    first = sources[0]
    if name in SEVERAL:
        return SEVERAL[name](given, sources, new)
    if first.rows is None:
        return None
    if name in KEEP_ALL or name == "embedding":
        return first.rows
    if name in RULES:
        return None if part else RULES[name](first.rows, given, first.shape, new)
    return follow(name, given, sources, new, part) if name in AS_ROWS else None


def _rows(source: Source) -> Rows:
    assert source.rows is not None
    return source.rows


def _joined(given: Arguments, known: Sources, new: Shape) -> Rows | None:
    """One after the other along the axis that is joined; what is no position (a class token) has no number."""
    dim = given.get("dim", given.get("axis", 0)) % len(new)
    if all(_rows(source).axis != dim for source in known):
        return agreed([_rows(source) for source in known])
    held = {id(source.tensor): source for source in known if _rows(source).axis == dim}
    parts = [
        _rows(held[id(tensor)]).of_entries(tensor.shape[dim])
        if id(tensor) in held
        else torch.full((tensor.shape[dim],), -1)
        for tensor in given["tensors"]
        # torch skips empty vectors, whatever the axis
        if tensor.ndim == len(new)
    ]
    return along(dim, torch.cat(parts), _rows(known[0]).rows) if len(held) == len(known) else None


def _elementwise(known: Sources, new: Shape) -> Rows | None:
    """The axis that all count by; where they differ (scores and a mask of their keys), that of the operand in full."""
    every = [(_rows(one).at(axis_of(_rows(one)) + len(new) - len(one.shape)), one.shape) for one in known]
    whole = [rows for rows, shape in every if tuple(shape) == tuple(new)]
    return agreed([rows for rows, _ in every]) or agreed(whole)


def _product(given: Arguments, sources: Sources, new: Shape) -> Rows | None:
    """(…, i, j) · (…, j, k): those of i (the queries of attention) before those of k; what is summed over is lost."""
    left, right = [value for value in given.values() if isinstance(value, torch.Tensor)][-2:]
    for tensor, summed, other in ((left, left.dim() - 1, right), (right, max(right.dim() - 2, 0), left)):
        rows = next((source.rows for source in sources if source.tensor is tensor), None)
        if rows is not None and rows.axis != summed:
            return rows.at(axis_of(rows) + len(new) - tensor.dim() + (other.dim() == 1))
    return None


def _einsum(given: Arguments, sources: Sources, new: Shape) -> Rows | None:
    """The same of named axes: the first operand's that stays."""
    terms, arrow, out = given["equation"].replace(" ", "").partition("->")
    if "." in terms or not arrow:
        return None
    for term, operand in zip(terms.split(","), given["tensors"], strict=True):
        rows = next((source.rows for source in sources if source.tensor is operand), None)
        if rows is not None and term[axis_of(rows)] in out:
            return rows.at(out.index(term[axis_of(rows)]))
    return None


def _stay(rows: Rows, given: Arguments, old: Shape, new: Shape) -> Rows | None:
    axis = axis_of(rows)
    return rows if len(new) == len(old) and new[axis] == old[axis] else None


def _last_made(rows: Rows, given: Arguments, old: Shape, new: Shape) -> Rows | None:
    """What makes its last axis anew, from all of it."""
    return None if rows.axis == len(old) - 1 or "batch_sizes" in given else _stay(rows, given, old, new)


def _padded(rows: Rows, given: Arguments, old: Shape, new: Shape) -> Rows | None:
    axis, pad = axis_of(rows), list(given["pad"] if "pad" in given else given["padding"])
    before, after = (pad + [0, 0] * len(old))[2 * (len(old) - 1 - axis) :][:2]
    return _between(rows, old[axis], before, after)


def _between(rows: Rows, size: int, before: int, after: int) -> Rows:
    """The axis with entries of no position before and after it, or without some of its own."""
    index = torch.cat([torch.full((max(before, 0),), -1), rows.of_entries(size), torch.full((max(after, 0),), -1)])
    return along(axis_of(rows), index[max(-before, 0) : len(index) - max(-after, 0)], rows.rows)


def _convolved(rows: Rows, given: Arguments, old: Shape, new: Shape) -> Rows | None:
    """Of a window over padding and positions, that behind the padding: its middle, of a causal one its last."""
    axis, dims = axis_of(rows), given["weight"].dim() - 2
    spatial = axis - (len(old) - dims)
    if spatial < 0:
        return rows if axis != len(old) - dims - 1 else None
    reach = _along(given.get("dilation", 1), spatial) * (given["weight"].shape[2 + spatial] - 1)
    padding = given.get("padding", 0)
    before = {"same": reach // 2, "valid": 0}[padding] if isinstance(padding, str) else _along(padding, spatial)
    if _along(given.get("stride", 1), spatial) != 1:
        return None
    padded = _between(rows, old[axis], before, reach - before if padding == "same" else before)
    index = padded.of_entries(new[axis] + reach)
    first = min(int((index >= 0).int().argmax()), reach)
    return along(axis, index[first : first + new[axis]], rows.rows)


def _along(setting: Any, spatial: int) -> int:
    """A setting of a convolution along one of its axes."""
    values = [setting] if isinstance(setting, int) else list(setting)
    return int(values[spatial if len(values) > 1 else 0])


RULES: dict[str, Callable[[Rows, Arguments, Shape, Shape], Rows | None]] = {
    **dict.fromkeys(POOLS | DATA_NORMS | BATCH_NORMS | DROPOUTS, _stay),
    **dict.fromkeys(words("avg_pool1d avg_pool2d avg_pool3d softmax log_softmax _softmax _log_softmax"), _stay),
    **dict.fromkeys(words("adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d cumsum cumprod"), _stay),
    **dict.fromkeys(words("linear scaled_dot_product_attention lstm gru rnn_tanh rnn_relu glu"), _last_made),
    **dict.fromkeys(words("pad constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d"), _padded),
    **dict.fromkeys(CONVOLUTIONS, _convolved),
}
SEVERAL: dict[str, Callable[[Arguments, Sources, Shape], Rows | None]] = {
    **dict.fromkeys(words("matmul mm bmm mv addmm baddbmm addmv"), _product),
    "einsum": _einsum,
}
# rearranged or chosen as rows are
AS_ROWS = (ONE.keys() | PARTS.keys() | words("stack index_select index gather")) - words("roll sort argsort topk")
