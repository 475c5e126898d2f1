"""Sums over neighbours between a weight and its gate: Â (X W), as a product or as messages gathered and scattered.

Layer 1. Such a sum acts alike on every unit, so (Â (X W)) = (Â X) W: the presentation is the aggregated neighbourhood
Â X, made by applying the model's own operations to X. A sum whose coefficients are learned is none (attention).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pipeline.flow.operators import words
from pipeline.flow.record import Fixed, Graph, Node
from pipeline.flow.values import Call, Value

_PRODUCTS = words("mm matmul bmm spmm _sparse_mm")
_CHOICES = words("index_select index gather")
_SCALINGS = words("mul div")
_SCATTERS = words("index_add scatter_add scatter_reduce index_reduce")


def mixes(node: Node, value: Value) -> bool:
    """Whether the operation sums `value` over neighbours with coefficients that are not learned."""
    name = node.op.name
    if name in _PRODUCTS:
        left, right = node.args[:2]
        return right is value and left is not value and not _learned(left)
    if name in _SCATTERS and _source(node) is value:
        reduce = node.args[4] if len(node.args) > 4 else node.kwargs.get("reduce", "sum")
        return reduce in ("sum", "mean") or name in ("index_add", "scatter_add")
    return False


def gathers(graph: Graph, node: Node, value: Value) -> bool:
    """Whether the operation chooses or weights neighbours of `value`, on the way to a sum over them."""
    name = node.op.name
    if name in _CHOICES:
        return node.args[0] is value and all(not held.learned for held in node.inputs if held is not value)
    if name in _SCALINGS and len(node.inputs) == 2:
        other = node.inputs[0] if node.inputs[1] is value else node.inputs[1]
        alike = graph.shapes[other][-1:] in ((), (1,))
        return alike and not other.learned and not (name == "div" and node.args[0] is not value)
    return False


def _learned(operand: Any) -> bool:
    held = operand.value if isinstance(operand, Fixed) else operand
    return not isinstance(held, Value) or held.learned


def _source(node: Node) -> Any:
    # (self, dim, index, source, …)
    return node.args[3] if len(node.args) > 3 else node.kwargs.get("source", node.kwargs.get("src"))


def spread_shadow(shadow: torch.Tensor, out: torch.Size) -> torch.Tensor | None:
    """The shadow behind the operation: units stay along the last axis; None where they do not, or nothing is there."""
    if not shadow.numel():
        return None
    units = shadow.reshape(-1, shadow.shape[-1])[:1]
    if shadow.dim() == 0 or out[-1:] != shadow.shape[-1:] or not bool((shadow == units).all()):
        return None
    return units.view([1] * (len(out) - 1) + [-1]).expand(out)


Lift = Callable[[], torch.Tensor]


def lifted(call: Call, position: int, source: Lift) -> Lift:
    """What the operation makes of another tensor in place of its argument `position`, with other channels."""
    name = call.op.name
    args, kwargs = list(call.args), dict(call.kwargs)
    if name in _SCATTERS:
        return lambda: _scattered(call, source())
    if name == "gather":
        return lambda: _gathered(call, source())

    def run() -> torch.Tensor:
        args[position] = source()
        return call.func(*args, **kwargs)  # type: ignore[no-any-return]

    return run


def _scattered(call: Call, source: torch.Tensor) -> torch.Tensor:
    into, dim, index, *_ = call.args
    given = call.bound()
    base = source.new_zeros((*into.shape[:-1], source.shape[-1]))
    index = _as_wide(index, source.shape[-1]) if index.dim() == source.dim() and source.dim() > 1 else index
    name = call.op.name
    if name == "index_add":
        return torch.index_add(base, dim, index, source, alpha=given.get("alpha", 1))
    if name == "scatter_add":
        return torch.scatter_add(base, dim, index, source)
    reduce, self_too = given["reduce"], given.get("include_self", True)
    if name == "index_reduce":
        return torch.index_reduce(base, dim, index, source, reduce, include_self=self_too)
    return torch.scatter_reduce(base, dim, index, source, reduce, include_self=self_too)


def _gathered(call: Call, source: torch.Tensor) -> torch.Tensor:
    given = call.bound()
    return torch.gather(source, given["dim"], _as_wide(given["index"], source.shape[-1]))


def _as_wide(index: torch.Tensor, channels: int) -> torch.Tensor:
    return index[..., :1].expand(*index.shape[:-1], channels)


def from_neighbours(graph: Graph, value: Value) -> bool:
    """Whether a value is itself a sum over neighbours, through views."""
    node = graph.producer(value)
    while node is not None and not any(mixes(node, held) for held in node.inputs):
        source = node.inputs[0] if node.inputs else None
        passes = node.op.is_view and len(node.inputs) == 1
        if source is None or not (passes or gathers(graph, node, source)):
            return False
        node = graph.producer(source)
    return node is not None
