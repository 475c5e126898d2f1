"""How joins, choices, sums and products of several tensors carry rows.

Layer 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from pipeline.flow.operators import words
from pipeline.flow.row_views import Arguments, axis_of, without
from pipeline.flow.rows import Rows, Shape, agreed, along, chosen, whole


class Source(NamedTuple):
    """An operand that holds data, with its shape from before the operation."""

    rows: Rows | None
    shape: Shape
    tensor: torch.Tensor


Sources = Sequence[Source]


def _index_select(given: Arguments, sources: Sources, new: Shape, part: int) -> Rows | None:
    rows, old, source = sources[0]
    if source is not given["self"] or rows is None or rows.axis is None:
        # a fixed table is looked up by data, or all of it is of one row
        return rows.at(given["dim"] % len(new)) if rows is not None and rows.axis is not None else rows
    if given["dim"] % len(old) != rows.axis:
        return rows
    return chosen(rows, old[rows.axis], given["index"], rows.axis)


def _gather(given: Arguments, sources: Sources, new: Shape, part: int) -> Rows | None:
    candidates = [rows for rows, *_ in sources if rows is not None and rows.axis != given["dim"] % len(new)]
    return agreed([rows for rows in candidates if rows.axis is not None]) or agreed(candidates)


def _index(given: Arguments, sources: Sources, new: Shape, part: int) -> Rows | None:
    indices = given["indices"]
    rows, old, source = sources[0]
    if rows is None or source is not given["self"]:
        return _looked_up(sources, new)
    if rows.axis is None:
        return rows
    used = [axis for axis, index in enumerate(indices) if index is not None]
    if len(used) == 1 and indices[used[0]].dtype == torch.bool:
        return _masked(rows, used[0], indices[used[0]], old)
    if any(indices[axis].dtype == torch.bool for axis in used) or used != list(range(used[0], used[-1] + 1)):
        return None
    shape = torch.broadcast_shapes(*[indices[axis].shape for axis in used])
    axis = rows.axis
    if axis < used[0]:
        return rows
    if axis > used[-1]:
        return rows.at(axis - len(used) + len(shape))
    if len(shape) == 1:
        return chosen(rows, old[axis], indices[axis].expand(shape), used[0])
    return _chosen_together(rows.of_entries(old[axis])[indices[axis].expand(shape).cpu()], used[0], rows.rows)


def _chosen_together(of_chosen: torch.Tensor, first: int, rows: int) -> Rows | None:
    """The rows of what a table of indices chose, (nodes × neighbours) say: along the one axis that they differ on."""
    for axis in range(of_chosen.dim()):
        along_axis = of_chosen.movedim(axis, 0).flatten(1)
        if along_axis.shape[1] and bool((along_axis == along_axis[:, :1]).all()):
            return along(first + axis, along_axis[:, 0], rows)
    return None


def _masked(rows: Rows, first: int, mask: torch.Tensor, old: Shape) -> Rows | None:
    axis = axis_of(rows)
    if axis < first:
        return rows
    if axis >= first + mask.dim():
        return rows.at(axis - mask.dim() + 1)
    taken = mask.nonzero()[:, axis - first].cpu()
    return along(first, rows.of_entries(old[axis])[taken], rows.rows)


def _looked_up(sources: Sources, new: Shape) -> Rows | None:
    # a table without rows, indexed by data
    candidates = [rows for rows, shape, _ in sources if rows is not None and tuple(new[: len(shape)]) == tuple(shape)]
    return agreed(candidates)


def _embedding(given: Arguments, sources: Sources, new: Shape, part: int) -> Rows | None:
    return sources[-1].rows


def rows_of_bags(given: Arguments, sources: Sources) -> Rows | None:
    """Each bag is of the row that its offset is of, else of the row of its first index."""
    offsets, indices = given["offsets"], given["indices"]
    bags = len(offsets) - bool(given.get("include_last_offset", False))
    rows = _rows_of(sources, offsets)
    if rows is not None and rows.axis == 0 and bags == len(offsets):
        return rows
    rows = _rows_of(sources, indices)
    if rows is None or rows.axis is None:
        return rows
    if bags == rows.rows:
        return Rows(0, rows.rows)
    first = offsets[:bags].cpu()
    # an empty bag at the end begins behind the last index
    return along(0, rows.of_entries(len(indices) + 1)[first], rows.rows) if rows.index is None else None


def _bags(given: Arguments, sources: Sources, new: Shape, part: int) -> Rows | None:
    return rows_of_bags(given, sources) if part == 0 else None


def joined(sources: Sources, dim: int, new: Shape) -> Rows | None:
    """Rows of a concatenation along `dim`: those of the parts, one after another where `dim` carries them."""
    # torch skips empty vectors, whatever the axis
    sources = [source for source in sources if len(source.shape) == len(new)]
    known = [(source.rows, source.shape) for source in sources if source.rows is not None]
    if not known or len(known) < len(sources):
        return None
    if any(rows.axis not in (None, dim) for rows, _ in known):
        return agreed([rows for rows, _ in known if rows.axis is not None])
    if sum(shape[dim] for _, shape in known) != new[dim]:
        # constants (class tokens, zeros) are joined along: only where that is not the rows' axis
        return None if any(rows.axis == dim for rows, _ in known) else agreed([rows for rows, _ in known])
    first = known[0][0]
    if all(rows.axis == dim and rows.index is None and rows.inner == first.inner for rows, _ in known):
        return first
    if all(rows.axis is None for rows, _ in known) and (same := agreed([rows for rows, _ in known])):
        return same
    return along(dim, torch.cat([rows.of_entries(shape[dim]) for rows, shape in known]), first.rows)


def _stack(given: Arguments, sources: Sources, new: Shape, part: int) -> Rows | None:
    known = [source.rows for source in sources if source.rows is not None]
    dim = given.get("dim", 0) % len(new)
    if known and all(rows.axis is None for rows in known) and len(known) == new[dim]:
        return along(dim, torch.cat([rows.one() for rows in known]), known[0].rows)
    rows = agreed(known)
    return None if rows is None or rows.axis is None else rows.at(rows.axis + (dim <= rows.axis))


def reduced(rows: Rows, given: Arguments, old: Shape, new: Shape) -> Rows | None:
    """Rows of a reduction over some axes, or all."""
    dims = given.get("dim", given.get("dims"))
    if rows.axis is None:
        return rows
    if dims is None or (isinstance(dims, list | tuple) and not dims):
        return _of_one_row(rows)
    gone = {dim % len(old) for dim in ([dims] if isinstance(dims, int) else dims)}
    if rows.axis in gone:
        return _of_one_row(rows)
    return rows if len(new) == len(old) else without(rows, gone)


def _of_one_row(rows: Rows) -> Rows | None:
    """Everything is of one row where all entries are."""
    index = rows.index
    if index is None or not len(index) or not bool((index == index[0]).all()):
        return None
    return whole(index[0], rows.rows)


def _rows_of(sources: Sources, tensor: Any) -> Rows | None:
    return next((source.rows for source in sources if source.tensor is tensor), None)


PRODUCTS = words("matmul mm bmm mv addmm baddbmm addmv _sparse_mm _sparse_addmm")


def _product(given: Arguments, sources: Sources, new: Shape, part: int) -> Rows | None:
    """(…, i, j) · (…, j, k): what is summed over is lost, unless a square matrix sums each row's neighbours to it.

    One that has a single entry in each line sums nothing: it puts the rows in another order.
    """
    tensors = [value for value in given.values() if isinstance(value, torch.Tensor)][-2:]
    left, right = tensors
    kept = []
    left_rows, right_rows = _rows_of(sources, left), _rows_of(sources, right)
    if left_rows is not None and left_rows.axis is not None and left_rows.axis != left.dim() - 1:
        kept.append(left_rows.at(left_rows.axis + len(new) - left.dim() + (right.dim() == 1)))
    if right_rows is not None and right_rows.axis is not None and right_rows.axis != max(right.dim() - 2, 0):
        kept.append(right_rows.at(right_rows.axis + len(new) - right.dim() + (left.dim() == 1)))
    if kept:
        return agreed(kept)
    if right_rows is not None and right_rows.axis is not None and left.dim() > 1 and left.shape[-1] == left.shape[-2]:
        axis = len(new) - 2 if right.dim() > 1 else len(new) - 1
        order = None if left_rows is not None else _order_of(left)
        return right_rows.at(axis) if order is None else chosen(right_rows, left.shape[-1], order, axis)
    return None


def _order_of(matrix: torch.Tensor) -> torch.Tensor | None:
    """Which column has the only entry of each line of a matrix; None where some line has several, or none."""
    if matrix.dim() > 2:
        return None
    if matrix.layout is torch.strided:
        entries = matrix != 0
        return entries.int().argmax(1) if bool((entries.sum(1) == 1).all()) else None
    line, column = matrix.to_sparse_coo().coalesce().indices()
    return column if torch.equal(line.cpu(), torch.arange(len(matrix))) else None


def _einsum(given: Arguments, sources: Sources, new: Shape, part: int) -> Rows | None:
    equation: str = given["equation"].replace(" ", "")
    terms, arrow, out = equation.partition("->")
    if "..." in equation or not arrow:
        return _first_axis(sources, new)
    kept = []
    for term, operand in zip(terms.split(","), given["tensors"], strict=True):
        rows = _rows_of(sources, operand)
        if rows is not None and rows.axis is not None and term[rows.axis] in out:
            kept.append(rows.at(out.index(term[rows.axis])))
    return agreed(kept)


def _first_axis(sources: Sources, new: Shape) -> Rows | None:
    known = [(source.rows, source.shape) for source in sources if source.rows is not None]
    same = [rows for rows, shape in known if rows.axis == 0 and new and shape[0] == new[0]]
    return agreed(same) if len(same) == len(known) else None


# sums into entries that an index names
SCATTERS = words("index_add scatter_add scatter_reduce index_reduce scatter")


def _scattered(given: Arguments, sources: Sources, new: Shape, part: int) -> Rows | None:
    """Sums into entries: each belongs to the row of what is summed into it, or is itself a row (nodes as rows)."""
    dim, index = given["dim"] % len(new), given["index"]
    source = given.get("source", given.get("src"))
    rows = _rows_of(sources, source) or _rows_of(sources, index)
    if rows is None or rows.axis != dim:
        return rows
    if index.dim() > 1:
        lines = index.movedim(dim, 0).flatten(1)
        if bool((lines != lines[:, :1]).any()):
            return None
        index = lines[:, 0]
    index = index.cpu()
    of_source = rows.of_entries(len(index))
    low = torch.full((new[dim],), rows.rows, dtype=torch.int64).scatter_reduce_(0, index, of_source, "amin")
    high = torch.full((new[dim],), -1, dtype=torch.int64).scatter_reduce_(0, index, of_source, "amax")
    touched = high >= 0
    if torch.equal(low[touched], high[touched]):
        nodes = rows.chosen_from
        if bool(touched.all()):
            return along(dim, high, rows.rows)
        if nodes is not None and len(nodes) == new[dim] and torch.equal(nodes[touched], high[touched]):
            return along(dim, nodes, rows.rows)  # some nodes are led to by no edge
    return Rows(dim, rows.rows) if new[dim] == rows.rows else None


def _packed(given: Arguments, sources: Sources, new: Shape, part: int) -> Rows | None:
    """Packing (N, T, …) by lengths: step by step, the sequences that are as long."""
    rows, old, _ = sources[0]
    axis = 0 if given["batch_first"] else 1
    if part or rows is None or rows.axis != axis:
        return None
    lengths = given["lengths"].cpu()
    steps = torch.arange(int(lengths.max()))
    which = (lengths > steps[:, None]).nonzero()[:, 1]
    return along(0, rows.of_entries(old[axis])[which], rows.rows)


def _unpacked(given: Arguments, sources: Sources, new: Shape, part: int) -> Rows | None:
    rows = sources[0].rows
    if rows is None or rows.axis != 0:
        return None
    count = int(given["batch_sizes"][0])
    axis = (0 if given["batch_first"] else 1) if part == 0 else 0
    return along(axis, rows.of_entries(len(given["data"]))[:count], rows.rows)


def _recurrent(given: Arguments, sources: Sources, new: Shape, part: int) -> Rows | None:
    """(output, h_n, c_n): the output as the input, the states with the rows along their second axis."""
    rows, old, _ = sources[0]
    if rows is None or rows.axis is None or part == 0:
        return rows
    if "batch_sizes" in given:
        count = int(given["batch_sizes"][0])
        return along(1, rows.of_entries(old[0])[:count], rows.rows)
    return rows.at(1) if len(new) == 3 else None


JOINS = words("cat concat concatenate")
MANY: dict[str, Callable[[Arguments, Sources, Shape, int], Rows | None]] = {
    "stack": _stack,
    "index_select": _index_select,
    "index": _index,
    "gather": _gather,
    "embedding": _embedding,
    "embedding_bag": _bags,
    **dict.fromkeys(PRODUCTS, _product),
    "einsum": _einsum,
    **dict.fromkeys(SCATTERS, _scattered),
    "_pack_padded_sequence": _packed,
    "_pad_packed_sequence": _unpacked,
    **dict.fromkeys(words("lstm gru rnn_tanh rnn_relu"), _recurrent),
}
REDUCTIONS = words(
    "sum mean amax amin max min prod std var logsumexp norm linalg_norm linalg_vector_norm argmax argmin any all "
    "std_mean var_mean median nansum nanmean count_nonzero"
)
