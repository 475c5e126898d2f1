"""What is folded into a site's pattern behind its affine map: norms by running statistics, gains, biases, numbers.

Layer 1.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from pipeline.flow.numbers import ScalarMap
from pipeline.flow.path import Path, per_unit, unit_axis
from pipeline.flow.record import Graph, Node, fixed_in, fixed_names
from pipeline.flow.values import Origin


def batch_norm(path: Path, node: Node) -> Path:
    """Behind a norm of each channel: folded where its statistics are fixed, else met as a norm."""
    given = dict(zip(node.op.arguments, node.args, strict=False))
    weight, bias, mean = given["weight"], given["bias"], given["running_mean"]
    if given.get("training", False) or mean is None:
        return replace(normed(path, node), over_batch=True)
    var_C = given["running_var"].tensor.double().cpu()
    scale_C = (var_C + given["eps"]).rsqrt() * (1 if weight is None else weight.tensor.detach().double().cpu())
    shift_C = (0 if bias is None else bias.tensor.detach().double().cpu()) - mean.tensor.double().cpu() * scale_C
    trailing = [1] * (path.shadow.dim() - 2)
    return _folded(path, node, scale_C.view(-1, *trailing), shift_C.view(-1, *trailing), names_it=True)


def number_map(path: Path, node: Node, number: ScalarMap) -> Path:
    """Behind a product or a sum with a number."""
    return _folded(path, node, torch.tensor(number.scale).double(), torch.tensor(number.shift).double())


def channel_map(graph: Graph, path: Path, node: Node) -> Path:
    """Behind a sum or a product with a parameter."""
    name, fixed = node.op.name, fixed_in(node)
    same_shape = graph.shapes[node.outputs[0]] == path.shadow.shape
    if len(fixed) != 1 or fixed[0].value.origin is not Origin.PARAMETER or not same_shape or "alpha" in node.kwargs:
        return path.ended(name)
    number = fixed[0].tensor.detach().double().cpu()
    one, zero = torch.ones_like(number), torch.zeros_like(number)
    first = node.args[0] is path.value
    if name == "add":
        return _folded(path, node, one, number)
    if name == "sub":
        return _folded(path, node, one if first else -one, -number if first else number, names_it=not first)
    if name == "mul":
        return _folded(path, node, number, zero, names_it=True)
    return _folded(path, node, one / number, zero, names_it=True) if first else path.ended(name)


def _folded(path: Path, node: Node, scale: torch.Tensor, shift: torch.Tensor, *, names_it: bool = False) -> Path:
    scale_U, shift_U = per_unit(path, scale), per_unit(path, shift)
    if path.norm is not None or scale_U is None or shift_U is None or (path.gathered and not path.lifts):
        return path.ended(node.op.name)
    turned = int((scale_U[path.units] < 0).sum()) if path.pooled else 0
    axis = unit_axis(path.shadow, len(path.scale_U), likeliest=path.unit_axis)
    if path.lifts and axis is None:
        return path.ended(node.op.name)
    names = fixed_names([node])
    return replace(
        path,
        value=node.outputs[0],
        scale_U=path.scale_U * scale_U,
        shift_U=path.shift_U * scale_U + shift_U,
        folded=(*path.folded, owner_of(node, names)) if names_it else path.folded,
        fixed=path.fixed | names,
        behind=(*path.behind, node),
        trail=None if path.trail is None or axis is None else (*path.trail, node),
        unit_axis=path.unit_axis if axis is None else axis,
        scaled=True,
        turned=path.turned + turned,
    )


def owner_of(node: Node, names: frozenset[str]) -> str:
    """The path of the module that an operation belongs to: its parameters' owner, else the module that runs it."""
    owners = sorted({name.rpartition(".")[0] or name for name in names})
    return node.module if not owners or node.module in owners else owners[0]


def normed(path: Path, node: Node) -> Path:
    """Behind a norm whose statistics come from the data."""
    axis = unit_axis(path.shadow, len(path.scale_U), likeliest=path.unit_axis)
    if path.trail is None or path.norm is not None or path.gathered or axis is None:
        return path.ended(node.op.name)
    names = fixed_names([node])
    return replace(
        path,
        value=node.outputs[0],
        norm=owner_of(node, names) or node.op.name,
        fixed=path.fixed | names,
        behind=(*path.behind, node),
        trail=(*path.trail, node),
        unit_axis=axis,
    )
