"""How views and copies of one tensor carry its rows.

Layer 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from pipeline.flow.operators import words
from pipeline.flow.rows import Rows, Shape, along, reshaped, whole

Arguments = Mapping[str, Any]


def axis_of(rows: Rows) -> int:
    """The axis of rows that lie along one."""
    assert rows.axis is not None
    return rows.axis


def _moved(rows: Rows, order: Sequence[int]) -> Rows:
    # order[i] is the input axis that becomes output axis i
    return rows.at(list(order).index(axis_of(rows)))


def _transpose(rows: Rows, given: Arguments, old: Shape, new: Shape) -> Rows | None:
    order = list(range(len(old)))
    if len(old) < 2:
        return rows
    first, second = given.get("dim0", given.get("axis0", -2)), given.get("dim1", given.get("axis1", -1))
    order[first], order[second] = order[second], order[first]
    return _moved(rows, order)


def _permute(rows: Rows, given: Arguments, old: Shape, new: Shape) -> Rows | None:
    return _moved(rows, [dim % len(old) for dim in given["dims"]])


def _reverse(rows: Rows, given: Arguments, old: Shape, new: Shape) -> Rows | None:
    return _moved(rows, range(len(old))[::-1])


def _movedim(rows: Rows, given: Arguments, old: Shape, new: Shape) -> Rows | None:
    source, target = given["source"], given["destination"]
    sources = [source] if isinstance(source, int) else source
    targets = [target] if isinstance(target, int) else target
    placed = {t % len(old): s % len(old) for s, t in zip(sources, targets, strict=True)}
    rest = iter(axis for axis in range(len(old)) if axis not in placed.values())
    return _moved(rows, [placed[axis] if axis in placed else next(rest) for axis in range(len(old))])


def without(rows: Rows, gone: set[int]) -> Rows | None:
    """The rows after some axes are gone; None if theirs is."""
    axis = axis_of(rows)
    return None if axis in gone else rows.at(axis - sum(lost < axis for lost in gone))


def _select(rows: Rows, given: Arguments, old: Shape, new: Shape) -> Rows | None:
    dim = given["dim"] % len(old)
    if dim == rows.axis:
        return whole(rows.of_entries(old[dim])[given["index"]], rows.rows)
    return without(rows, {dim})


def _unbind(rows: Rows, given: Arguments, old: Shape, new: Shape, part: int) -> Rows | None:
    return _select(rows, {"dim": given.get("dim", 0), "index": part}, old, new)


def _slice(rows: Rows, given: Arguments, old: Shape, new: Shape) -> Rows | None:
    dim = given.get("dim", 0) % len(old)
    if dim != rows.axis or new[dim] == old[dim]:
        return rows
    stop = given["start"] + given["length"] if "length" in given else given.get("end")
    return along(dim, rows.of_entries(old[dim])[given.get("start") : stop : given.get("step", 1)], rows.rows)


def _split(rows: Rows, given: Arguments, old: Shape, new: Shape, part: int) -> Rows | None:
    dim = given.get("dim", 0) % len(old)
    if dim != rows.axis:
        return rows
    sizes = given.get("split_sizes", given.get("split_size", given.get("chunks")))
    if isinstance(sizes, list | tuple):
        start = sum(sizes[:part])
    elif "chunks" in given:
        start = part * -(-old[dim] // sizes)
    else:
        start = part * sizes
    return along(dim, rows.of_entries(old[dim])[start : start + new[dim]], rows.rows)


def _squeeze(rows: Rows, given: Arguments, old: Shape, new: Shape) -> Rows | None:
    dims = given.get("dim", range(len(old)))
    dims = [dims] if isinstance(dims, int) else dims
    gone = {dim % len(old) for dim in dims if old[dim] == 1}
    return whole(rows.of_entries(1), rows.rows) if rows.axis in gone else without(rows, gone)


def _unsqueeze(rows: Rows, given: Arguments, old: Shape, new: Shape) -> Rows | None:
    return rows.at(axis_of(rows) + (given["dim"] % len(new) <= axis_of(rows)))


def _expand(rows: Rows, given: Arguments, old: Shape, new: Shape) -> Rows | None:
    axis = axis_of(rows) + len(new) - len(old)
    if new[axis] == old[axis_of(rows)]:
        return rows.at(axis)
    return along(axis, rows.of_entries(1).expand(new[axis]), rows.rows)


def _reshape(rows: Rows, given: Arguments, old: Shape, new: Shape) -> Rows | None:
    return reshaped(rows, old, new)


def _repeat(rows: Rows, given: Arguments, old: Shape, new: Shape) -> Rows | None:
    axis = axis_of(rows) + len(new) - len(old)
    times = new[axis] // max(old[axis_of(rows)], 1)
    return rows.at(axis) if rows.index is None else along(axis, rows.index.repeat(times), rows.rows)


def _repeat_interleave(rows: Rows, given: Arguments, old: Shape, new: Shape) -> Rows | None:
    dim, repeats = given.get("dim"), given["repeats"]
    if dim is None:
        return None
    if dim % len(old) != rows.axis:
        return rows
    times = repeats.cpu() if isinstance(repeats, torch.Tensor) else repeats
    return along(axis_of(rows), rows.of_entries(old[dim]).repeat_interleave(times), rows.rows)


def _reordered(rows: Rows, given: Arguments, old: Shape, new: Shape) -> Rows | None:
    dims = given.get("dims", given.get("dim", -1))
    return _kept_beside([dims] if isinstance(dims, int) else dims, rows, old, new)


def _kept_beside(dims: Sequence[int] | None, rows: Rows, old: Shape, new: Shape) -> Rows | None:
    """The rows of what is done along some axes; None if they lie along one of them, or all may be meant."""
    axis = axis_of(rows)
    if not dims or axis in [dim % len(old) for dim in dims] or axis >= len(new):
        return None
    return rows if new[axis] == old[axis] else None


def _rolled(rows: Rows, given: Arguments, old: Shape, new: Shape) -> Rows | None:
    # without axes, all of it in one line
    dims = given.get("dims", ())
    return _kept_beside([dims] if isinstance(dims, int) else dims, rows, old, new)


def _turned(rows: Rows, given: Arguments, old: Shape, new: Shape) -> Rows | None:
    return _kept_beside(given.get("dims", (0, 1)), rows, old, new)


def _transformed(rows: Rows, given: Arguments, old: Shape, new: Shape) -> Rows | None:
    return _kept_beside([given.get("dim", -1)], rows, old, new)


def _transformed_twice(rows: Rows, given: Arguments, old: Shape, new: Shape) -> Rows | None:
    return _kept_beside(given.get("dim", (-2, -1)), rows, old, new)


def _transformed_all(rows: Rows, given: Arguments, old: Shape, new: Shape) -> Rows | None:
    return _kept_beside(given.get("dim"), rows, old, new)


def _taken_along(rows: Rows, given: Arguments, old: Shape, new: Shape) -> Rows | None:
    dim = given.get("dim")
    return None if dim is None else _kept_beside([dim], rows, old, new)


def _padded(rows: Rows, given: Arguments, old: Shape, new: Shape) -> Rows | None:
    pad = given["pad"] if "pad" in given else given["padding"]
    # from the last axis on
    first = 2 * (len(old) - 1 - axis_of(rows))
    return rows if not any(pad[first : first + 2]) else None


def _windows(rows: Rows, given: Arguments, old: Shape, new: Shape) -> Rows | None:
    return _kept_beside([given["dimension"]], rows, old, new)


def _diagonal(rows: Rows, given: Arguments, old: Shape, new: Shape) -> Rows | None:
    return without(rows, {given.get("dim1", 0) % len(old), given.get("dim2", 1) % len(old)})


def _side(axis: int) -> Callable[[Rows, Arguments, Shape, Shape], Rows | None]:
    return lambda rows, given, old, new: _flip(rows, {"dims": [axis]}, old, new)


def _split_beside(rows: Rows, given: Arguments, old: Shape, new: Shape, part: int) -> Rows | None:
    return _kept_beside([given.get("dim", 0)], rows, old, new)


def _split_side(axis: int) -> Callable[[Rows, Arguments, Shape, Shape, int], Rows | None]:
    return lambda rows, given, old, new, part: _kept_beside([min(axis, len(old) - 1)], rows, old, new)


def _dotted(rows: Rows, given: Arguments, old: Shape, new: Shape) -> Rows | None:
    return without(rows, {given.get("dim", -1) % len(old)})


def _compared(rows: Rows, given: Arguments, old: Shape, new: Shape) -> Rows | None:
    return without(rows, {given.get("dim", 1) % len(old)})


def _flip(rows: Rows, given: Arguments, old: Shape, new: Shape) -> Rows | None:
    if axis_of(rows) in [dim % len(old) for dim in given["dims"]]:
        return along(axis_of(rows), rows.of_entries(old[axis_of(rows)]).flip(0), rows.rows)
    return rows


ONE: dict[str, Callable[[Rows, Arguments, Shape, Shape], Rows | None]] = {
    **dict.fromkeys(
        words("view reshape reshape_as flatten unflatten _unsafe_view view_as ravel _reshape_alias"), _reshape
    ),
    **dict.fromkeys(words("transpose swapaxes swapdims t mT adjoint"), _transpose),
    **dict.fromkeys(words("numpy_T H mH"), _reverse),
    **dict.fromkeys(words("movedim moveaxis"), _movedim),
    **dict.fromkeys(words("slice narrow"), _slice),
    **dict.fromkeys(words("expand expand_as broadcast_to"), _expand),
    **dict.fromkeys(words("repeat tile"), _repeat),
    # these reorder or mix entries along an axis: there the rows are lost
    **dict.fromkeys(words("sort argsort cumsum cumprod cummax cummin logcumsumexp topk softmax softmin"), _reordered),
    **dict.fromkeys(words("log_softmax _softmax _log_softmax kthvalue mode diff"), _reordered),
    "roll": _rolled,
    "rot90": _turned,
    "take_along_dim": _taken_along,
    **dict.fromkeys(words("fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft"), _transformed),
    **dict.fromkeys(words("fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2"), _transformed_twice),
    **dict.fromkeys(words("fft_fftn fft_ifftn fft_rfftn fft_irfftn _fft_r2c _fft_c2r _fft_c2c"), _transformed_all),
    **dict.fromkeys(words("fft_fftshift fft_ifftshift"), _transformed_all),
    **dict.fromkeys(words("pad constant_pad_nd _pad_enum _pad_circular"), _padded),
    **dict.fromkeys(words("reflection_pad1d reflection_pad2d reflection_pad3d"), _padded),
    **dict.fromkeys(words("replication_pad1d replication_pad2d replication_pad3d"), _padded),
    "unfold": _windows,
    "diagonal": _diagonal,
    "fliplr": _side(1),
    "flipud": _side(0),
    "cosine_similarity": _compared,
    "linalg_vecdot": _dotted,
    "permute": _permute,
    "select": _select,
    "squeeze": _squeeze,
    "unsqueeze": _unsqueeze,
    "repeat_interleave": _repeat_interleave,
    "flip": _flip,
}
PARTS: dict[str, Callable[[Rows, Arguments, Shape, Shape, int], Rows | None]] = {
    "unbind": _unbind,
    "tensor_split": _split_beside,
    "hsplit": _split_side(1),
    "vsplit": _split_side(0),
    "dsplit": _split_side(2),
    **dict.fromkeys(words("chunk split split_with_sizes unsafe_chunk unsafe_split unsafe_split_with_sizes"), _split),
}
KEEP_ALL = words("contiguous clone detach alias to _to_copy type_as lift_fresh positive dropout")
