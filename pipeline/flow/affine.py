"""Recognises affine maps among operations: one operand made of data, the other of parameters.

Layer 1. What it returns names operands and geometry of one call; the same at the probe and at measure time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_letters
from typing import Any

import torch

from pipeline.flow.bags import Bags, bags_of
from pipeline.flow.operators import CONVOLUTIONS, TRANSPOSED
from pipeline.flow.patches import Contraction, Convolution, Geometry, dense
from pipeline.flow.rows import Rows
from pipeline.flow.transposed import Axis, Phase
from pipeline.flow.values import Call, Origin, Value


@dataclass(frozen=True, eq=False)
class Affine:
    """One affine call: z = geometry(x) · weight + bias."""

    x: torch.Tensor
    x_value: Value
    weight: torch.Tensor
    weight_value: Value
    bias: torch.Tensor | None
    bias_value: Value | None
    geometry: Geometry


def affine_of(call: Call) -> Affine | None:
    """The affine map that an operation on data is, None if it is none."""
    recognise = _RECOGNISERS.get(call.op.name)
    return recognise(call) if recognise is not None else None


def is_affine(call: Call) -> bool:
    """Whether the operation is of a kind that can be an affine map."""
    return call.op.name in _RECOGNISERS


def _value(call: Call, tensor: torch.Tensor) -> Value:
    position = call.position_of(tensor)
    assert position is not None
    return call.values[position]


def _build(call: Call, x: Any, weight: Any, bias: torch.Tensor | None, geometry: Geometry) -> Affine | None:
    bias_value = None if bias is None else _value(call, bias)
    if not _can_be(call, x, weight, bias_value, geometry):
        return None
    return Affine(x, _value(call, x), weight, _value(call, weight), bias, bias_value, geometry)


def _can_be(call: Call, x: Any, weight: Any, bias: Value | None, geometry: Geometry) -> bool:
    """Whether data meets a weight here: x is data, weight and bias are none."""
    value = _value(call, weight)
    if _value(call, x).origin is not Origin.DATA or value.origin is not Origin.PARAMETER or value.fed:
        return False
    if isinstance(geometry, Contraction) and not value.learned and call.op.name != "linear":
        # a fixed matrix (an adjacency, a filter bank) mixes data; it has no units
        return False
    return bias is None or bias.origin is not Origin.DATA


def _linear(call: Call) -> Affine | None:
    x, weight, *rest = call.args
    if weight.dim() != 2:
        return None
    return _build(call, x, weight, rest[0] if rest else call.kwargs.get("bias"), dense(x.dim()))


def _matmul(call: Call) -> Affine | None:
    left, right = call.args[:2]
    return _product(call, left, right, None)


def _addmm(call: Call) -> Affine | None:
    bias, left, right = call.args[:3]
    if call.kwargs.get("beta", 1) != 1 or call.kwargs.get("alpha", 1) != 1:
        return None
    return _product(call, left, right, bias)


def _product(call: Call, left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None) -> Affine | None:
    data_left = _value(call, left).origin is Origin.DATA
    if data_left == (_value(call, right).origin is Origin.DATA) or min(left.dim(), right.dim()) == 0:
        return None
    x, weight = (left, right) if data_left else (right, left)
    labels = _matmul_labels(left, right)
    x_labels, weight_labels = labels[:2] if data_left else labels[1::-1]
    return _contraction(call, x, weight, bias, x_labels, weight_labels, labels[2])


def _matmul_labels(left: torch.Tensor, right: torch.Tensor) -> tuple[str, str, str]:
    # batch axes are labelled from the end; an axis of size 1 that is broadcast gets a label of its own
    batch = max(left.dim(), right.dim()) - 2
    shared = ascii_letters[3 : 3 + max(batch, 0)]

    def leading(tensor: torch.Tensor) -> str:
        count = max(tensor.dim() - 2, 0)
        return shared[len(shared) - count :]

    left_core = "ab" if left.dim() > 1 else "b"
    right_core = "bc" if right.dim() > 1 else "b"
    out = shared + ("a" if left.dim() > 1 else "") + ("c" if right.dim() > 1 else "")
    return leading(left) + left_core, leading(right) + right_core, out


def _embedding_bag(call: Call) -> Affine | None:
    weight = call.args[0]
    value = _value(call, weight)
    bags = bags_of(call) if value.origin is Origin.PARAMETER and value.learned else None
    return None if bags is None else Affine(*bags, weight, value, None, None, Bags("nd", "du", "nu"))


def _einsum(call: Call) -> Affine | None:
    equation, operands = call.args[0], call.args[1]
    if len(operands) != 2:
        return None
    data_first = _value(call, operands[0]).origin is Origin.DATA
    if data_first == (_value(call, operands[1]).origin is Origin.DATA):
        return None
    terms, out = _spelled_out(equation, [operand.dim() for operand in operands])
    x, weight = operands if data_first else operands[::-1]
    x_labels, weight_labels = terms if data_first else terms[::-1]
    return _contraction(call, x, weight, None, x_labels, weight_labels, out)


def _spelled_out(equation: str, dims: list[int]) -> tuple[list[str], str]:
    """The labels of an einsum's operands and output, ellipses written out."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    free = [letter for letter in ascii_letters if letter not in equation]
    widths = [dim - len(term.replace("...", "")) for term, dim in zip(terms, dims, strict=True)]
    hidden = "".join(free[: max([width for term, width in zip(terms, widths, strict=True) if "..." in term] or [0])])
    spelled = [term.replace("...", hidden[len(hidden) - width :]) for term, width in zip(terms, widths, strict=True)]
    if not arrow:
        once = sorted(label for label in set(left) if label.isalpha() and left.count(label) == 1)
        right = ("..." if "..." in left else "") + "".join(once)
    return spelled, right.replace("...", hidden)


def _contraction(
    call: Call, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, x_labels: str, w_labels: str, out: str
) -> Affine | None:
    """A contraction, unless an axis is repeated, summed within one operand or broadcast."""
    if any(len(set(labels)) < len(labels) for labels in (x_labels, w_labels, out)):
        return None
    narrow = _once(weight, w_labels, x_labels, out, _value(call, x).rows)
    x_labels, w_labels = _unbroadcast(x_labels, x.shape, w_labels, narrow.shape)
    sizes = {**dict(zip(x_labels, x.shape, strict=True)), **dict(zip(w_labels, narrow.shape, strict=True))}
    shared = [label for label in w_labels if label in x_labels]
    lone = [label for label in x_labels + w_labels if label not in out and label not in shared]
    if any(sizes[label] != 1 for label in lone) or all(label in out for label in shared):
        return None
    groups = math.prod(sizes[label] for label in shared if label in out)
    geometry = Contraction(x_labels, w_labels, out, groups)
    bias_value = None if bias is None else _value(call, bias)
    if not _can_be(call, x, weight, bias_value, geometry):
        return None
    bias_U = None if bias is None else _bias_of_units(bias, geometry, sizes)
    if bias is not None and bias_U is None:
        return None
    return Affine(x, _value(call, x), narrow, _value(call, weight), bias_U, bias_value, geometry)


def _once(weight: torch.Tensor, w_labels: str, x_labels: str, out: str, rows: Rows | None) -> torch.Tensor:
    """A weight that is repeated along rows or positions of the data, without its repetitions."""
    of_rows = x_labels[rows.axis] if rows is not None and rows.axis is not None else ""
    for axis, label in enumerate(w_labels):
        if weight.shape[axis] > 1 and label in x_labels and label in out:
            one = weight.narrow(axis, 0, 1)
            if weight.stride(axis) == 0 or (label == of_rows and bool((weight == one).all())):
                weight = one
    return weight


def _bias_of_units(bias: torch.Tensor, geometry: Contraction, sizes: Mapping[str, int]) -> torch.Tensor | None:
    """A bias that is broadcast against the output as one number per unit; None where it differs between positions."""
    out, units = geometry.out_labels, [geometry.out_labels[axis] for axis in geometry.unit_axes]
    full = bias.reshape((1,) * (len(out) - bias.dim()) + tuple(bias.shape))
    if any(size != 1 and label not in units for label, size in zip(out, full.shape, strict=True)):
        return None
    full = full.expand([sizes[label] if label in units else 1 for label in out])
    return full.permute([*[out.index(label) for label in units], *_others(out, units)]).reshape(-1)


def _others(out: str, units: list[str]) -> list[int]:
    return [axis for axis, label in enumerate(out) if label not in units]


def _unbroadcast(left: str, left_shape: Sequence[int], right: str, right_shape: Sequence[int]) -> tuple[str, str]:
    """Give an axis of size 1 that is broadcast against the other operand a label of its own."""
    free = iter(letter for letter in reversed(ascii_letters) if letter not in left + right)
    sizes = dict(zip(right, right_shape, strict=True))
    for label, size in zip(left, left_shape, strict=True):
        other = sizes.get(label, size)
        if other != size and size == 1:
            left = left.replace(label, next(free))
        elif other != size and other == 1:
            right = right.replace(label, next(free))
    return left, right


def _convolution(call: Call) -> Affine | None:
    given = call.bound()
    x, weight = given["input"], given["weight"]
    dims = weight.dim() - 2
    kernel = tuple(weight.shape[2:])
    stride, dilation = _each(given.get("stride", 1), dims), _each(given.get("dilation", 1), dims)
    padding = given.get("padding", 0)
    if isinstance(padding, str):
        pads = tuple(_same(k, d) if padding == "same" else (0, 0) for k, d in zip(kernel, dilation, strict=True))
    else:
        pads = tuple((size, size) for size in _each(padding, dims))
    geometry = Convolution(kernel, stride, pads, dilation, int(given.get("groups", 1)))
    return _build(call, x, weight, given.get("bias"), geometry)


def _transposed(call: Call) -> Affine | None:
    given = call.bound()
    x, weight = given["input"], given["weight"]
    dims = weight.dim() - 2
    stride, padding = _each(given.get("stride", 1), dims), _each(given.get("padding", 0), dims)
    dilation, extra = _each(given.get("dilation", 1), dims), _each(given.get("output_padding", 0), dims)
    axes = []
    for size, k, s, p, d, more in zip(x.shape[-dims:], weight.shape[2:], stride, padding, dilation, extra, strict=True):
        axes.append(Axis(k, s, p, d, (size - 1) * s - 2 * p + d * (k - 1) + more + 1))
    return _build(call, x, weight, given.get("bias"), Phase(tuple(axes), (0,) * dims, int(given.get("groups", 1))))


def _general_convolution(call: Call) -> Affine | None:
    return _transposed(call) if call.bound().get("transposed") else _convolution(call)


def _each(value: int | list[int], dims: int) -> tuple[int, ...]:
    values = [value] if isinstance(value, int) else list(value)
    return tuple(values * dims if len(values) == 1 else values)


def _same(kernel: int, dilation: int) -> tuple[int, int]:
    total = dilation * (kernel - 1)
    return total // 2, total - total // 2


_RECOGNISERS: dict[str, Callable[[Call], Affine | None]] = {
    "linear": _linear,
    **dict.fromkeys(["matmul", "mm", "bmm", "mv", "_sparse_mm"], _matmul),
    **dict.fromkeys(["addmm", "baddbmm", "addmv"], _addmm),
    "einsum": _einsum,
    "embedding_bag": _embedding_bag,
    "convolution": _general_convolution,
    **dict.fromkeys(CONVOLUTIONS, _convolution),
    **dict.fromkeys(TRANSPOSED, _transposed),
}
