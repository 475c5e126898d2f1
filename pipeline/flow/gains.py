"""The gain and bias of a norm that feeds affine maps alone: folded into the pattern, x is what comes before them.

Layer 1. "Alone" means that whatever reads the norm's output, through views, is an affine map: where the residual stream
reads it too, the gain acts elsewhere as well and x is the norm's output.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from pipeline.flow.affine import Affine
from pipeline.flow.folds import owner_of
from pipeline.flow.gates import PASSING
from pipeline.flow.patches import Contraction
from pipeline.flow.record import Fixed, Graph, Node, fixed_names, rerun
from pipeline.flow.values import Call, Origin, Value

NORMS = frozenset(("layer_norm", "native_layer_norm", "rms_norm"))
# what may apply a gain or a bias: a norm's own operation, or a product and a sum where the norm is written out
APPLYING = NORMS | {"mul", "add"}


@dataclass(frozen=True, eq=False)
class Gain:
    """weight_D and bias_D of the norm (float64), its path, the keys by which they are recognised, its parameters."""

    weight_D: torch.Tensor
    bias_D: torch.Tensor
    norm: str
    keys: frozenset[int]
    names: frozenset[str]


def gain_of(graph: Graph, affine: Affine) -> Gain | None:
    """The gain that is folded into an affine map, None if there is none."""
    geometry = affine.geometry
    if not isinstance(geometry, Contraction) or len(geometry.pattern_shape(affine.weight)) != 1:
        return None
    if geometry.x_labels[-1] in geometry.out_labels:
        return None
    node, views = graph.producer(affine.x_value), list[Node]()
    while node is not None and (node.op.is_view or node.op.name in PASSING) and len(node.inputs) == 1:
        if len(node.outputs) != 1:
            return None
        views.append(node)
        node = graph.producer(node.inputs[0])
    if node is None or not _feeds_affine_alone(graph, node.outputs[0]):
        return None
    features = graph.shapes[affine.x_value][-1]
    if graph.shapes[node.outputs[0]][-1] != features or not _last_axis_stays(graph, node.outputs[0], views[::-1]):
        return None
    return _of_norm(node, features) if node.op.name in NORMS else _written_out(graph, node, features)


def _of_norm(node: Node, features: int) -> Gain | None:
    shape, weight, bias = (*node.args[1:], None, None)[:3]
    if not isinstance(weight, Fixed) or tuple(shape) != (features,):
        return None
    shift = bias if node.op.name != "rms_norm" and isinstance(bias, Fixed) else None
    return _gain([node], weight, shift)


def _written_out(graph: Graph, node: Node, features: int) -> Gain | None:
    """normalised · weight (+ bias), where what is multiplied has been divided by a statistic of its own row."""
    shift, product = None, node
    if node.op.name == "add":
        shift = _parameter(node, features)
        inner = graph.producer(node.inputs[0])
        if shift is None or inner is None or len(graph.consumers(inner.outputs[0])) != 1:
            return None
        product = inner
    weight = _parameter(product, features) if product.op.name == "mul" else None
    if weight is None or not _is_normalised(graph, product.inputs[0]):
        return None
    return _gain([node, product], weight, shift)


def _parameter(node: Node, features: int) -> Fixed | None:
    fixed = [arg for arg in node.args if isinstance(arg, Fixed)]
    if len(fixed) != 1 or len(node.inputs) != 1 or node.kwargs or not fixed[0].value.learned:
        return None
    return fixed[0] if tuple(fixed[0].tensor.shape) == (features,) else None


def _is_normalised(graph: Graph, value: Value) -> bool:
    node = graph.producer(value)
    while node is not None and node.op.name in PASSING:
        node = graph.producer(node.inputs[0])
    if node is None or node.op.name not in ("mul", "div") or len(node.inputs) != 2:
        return False
    return any(graph.shapes[held][-1:] == (1,) for held in node.inputs)


def _gain(nodes: list[Node], weight: Fixed, bias: Fixed | None) -> Gain:
    weight_D = weight.tensor.detach().double().cpu()
    bias_D = torch.zeros_like(weight_D) if bias is None else bias.tensor.detach().double().cpu()
    keys = frozenset([weight.value.key] + ([] if bias is None else [bias.value.key]))
    names = fixed_names(nodes)
    return Gain(weight_D, bias_D, owner_of(nodes[0], names) or nodes[0].op.name, keys, names)


def _feeds_affine_alone(graph: Graph, value: Value) -> bool:
    for reader in graph.consumers(value):
        if reader.affine is not None and reader.affine.x_value is value:
            continue
        through = reader.op.is_view or reader.op.name in PASSING
        if not through or not all(_feeds_affine_alone(graph, out) for out in reader.outputs):
            return False
    return bool(graph.consumers(value))


def _last_axis_stays(graph: Graph, value: Value, views: list[Node]) -> bool:
    shadow = torch.arange(graph.shapes[value][-1], dtype=torch.int32).expand(graph.shapes[value])
    for node in views:
        made = rerun(node, {node.inputs[0]: shadow})
        if made is None:
            return False
        shadow = made[0]
    return bool((shadow == torch.arange(shadow.shape[-1])).all())


class Moments(NamedTuple):
    """What a layer norm subtracts from each vector and multiplies it by: float32, one of each for a vector."""

    mean: torch.Tensor
    scale: torch.Tensor


def gives_moments(call: Call) -> bool:
    """Whether a norm's operation can be asked for its moments, on the CPU: of float32, as it lies in memory."""
    x = call.args[0] if call.args else None
    if call.op.name != "layer_norm" or call.kwargs or not isinstance(x, torch.Tensor):
        return False
    return x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous()


def asking_for_moments(call: Call) -> Call:
    """The same norm by the operation that gives its moments beside its output; where it `gives_moments`."""
    return replace(call, func=torch.ops.aten.native_layer_norm.default, args=asking(call.args))


def asking(args: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments of `layer_norm` as `native_layer_norm` takes them: without defaults."""
    return (*args[:5], *(None, None, 1e-5)[len(args) - 2 :])


def before_gain(call: Call) -> torch.Tensor:
    """What a norm's operation gives without its gain and bias."""
    given = call.bound()
    x, shape, eps = given["input"], given["normalized_shape"], given.get("eps")
    if call.op.name == "rms_norm":
        return functional.rms_norm(x, shape, None, eps)
    return functional.layer_norm(x, shape, None, None, 1e-5 if eps is None else eps)


def applied(call: Call, gains: frozenset[int]) -> tuple[torch.Tensor, int] | None:
    """The operand that a folded gain or bias is applied to, where the norm is written out, and the key of that."""
    if call.op.name in NORMS or len(call.tensors) != 2:
        return None
    for (tensor, value), (_, other) in itertools.permutations(zip(call.tensors, call.values, strict=True)):
        if value.origin is Origin.DATA and other.origin is Origin.PARAMETER and other.key in gains:
            return tensor, other.key
    return None
