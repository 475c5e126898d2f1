"""Follows a site's output through the recorded graph to its fold and its gate.

Layer 1. Every element of the output carries the number of its unit along, in a shadow tensor that the model's own
views, concatenations and pools are applied to: what arrives says exactly which unit is where.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from pipeline.flow.aggregate import gathers, mixes, spread_shadow
from pipeline.flow.folds import batch_norm, channel_map, normed, number_map
from pipeline.flow.gates import CHANNEL_MAPS, PASSING, find_gate
from pipeline.flow.numbers import SCALAR_MAPS, ScalarMap, scalar_map
from pipeline.flow.operators import BATCH_NORMS, DATA_NORMS, JOINS, POOLS
from pipeline.flow.path import ABSENT, Path, per_unit, placed
from pipeline.flow.record import Graph, Node, fixed_in, rerun
from pipeline.flow.values import Value


def follow(graph: Graph, value: Value, *, units: int, unit_axes: tuple[int, ...], biased: bool) -> list[Path]:
    """Every end of a site's output: one `Path` per reader that its numbers reach, in forward order.

    A gate that all units reach ends the search. `biased`: a bias has been added already, so that what sums over
    neighbours from here on is no affine map of their sum.
    """
    shape = graph.shapes[value]
    numbers = torch.arange(units, dtype=torch.int32).view([shape[axis] for axis in unit_axes])
    shadow = placed(numbers, shape, unit_axes)
    ones, zeros = torch.ones(units, dtype=torch.float64), torch.zeros(units, dtype=torch.float64)
    start = Path(
        value, shadow, ones, zeros, unit_axes[-1] if unit_axes else -1, trail=() if len(unit_axes) == 1 else None
    )
    return _ends(graph, start, biased)


def _ends(graph: Graph, path: Path, biased: bool) -> list[Path]:
    gate = find_gate(graph, path.value, lambda value, fixed: _fixed_number(graph, path, value, fixed))
    if gate is not None and len(path.units) == len(path.scale_U):
        return [replace(path, gate=gate)]
    ends = [replace(path, gate=gate)] if gate is not None else []
    inside = set(gate.nodes) if gate is not None else set()
    readers = [node for node in graph.consumers(path.value) if node not in inside]
    for node in readers:
        for taken in _step(graph, replace(path, last=node), node, biased):
            ends += [taken] if taken.end else _ends(graph, taken, biased)
            if ends and ends[-1].gate is not None and len(ends[-1].units) == len(path.scale_U):
                return ends
    return ends or [path.ended("output")]


def _fixed_number(graph: Graph, path: Path, value: Value, fixed: torch.Tensor) -> torch.Tensor | None:
    if len(graph.shapes[value]) != path.shadow.dim():
        return None
    numbers = per_unit(path, fixed.detach().cpu(), fixed.dtype)
    return None if numbers is None else numbers.to(fixed.device)


def _step(graph: Graph, path: Path, node: Node, biased: bool) -> list[Path]:
    name = node.op.name
    if node.op.is_view and path.value is not node.args[0]:
        return []  # only its shape or type is read
    if name in PASSING:
        return [replace(path, value=node.outputs[0])]
    if node.op.is_view:
        return [_cropped(graph, path, moved) for moved in _moved(graph, path, node)]
    if name in JOINS or (name in POOLS and len(node.inputs) == 1):
        if path.norm is not None or path.gathered:
            return [path.ended(name)]
        return _moved(graph, replace(path, trail=None, pooled=path.pooled or name in POOLS), node)[:1]
    if name in BATCH_NORMS:
        return [batch_norm(path, node)]
    if name in SCALAR_MAPS and len(node.inputs) == 1 and (number := scalar_map(node)) is not None:
        return _scaled(graph, path, node, number, biased)
    if name in CHANNEL_MAPS and len(node.inputs) == 1 and fixed_in(node):
        return [channel_map(graph, path, node)]
    if name in DATA_NORMS and node.inputs[0] is path.value:
        return [normed(path, node)]
    if gathers(graph, node, path.value) or mixes(node, path.value):
        return [_aggregated(graph, path, node, biased)]
    return [path.ended(name)]


def _cropped(graph: Graph, path: Path, moved: Path) -> Path:
    """A view that leaves positions out: what is met behind it is no longer every z of the site.

    With other readers (a loop over time, a class token) what becomes of one position says nothing of the others.
    """
    if moved.end or moved.shadow.numel() * len(path.units) >= path.shadow.numel() * len(moved.units):
        return moved
    if moved.norm is not None or moved.gathered or len(graph.consumers(path.value)) > 1:
        return moved.ended(moved.last.op.name if moved.last is not None else "")
    return replace(moved, trail=None)


def _moved(graph: Graph, path: Path, node: Node) -> list[Path]:
    given: dict[Value, torch.Tensor] = {
        value: torch.full(graph.shapes[value], ABSENT, dtype=torch.int32) for value in node.inputs
    }
    for arg in fixed_in(node):
        given[arg.value] = torch.full(arg.tensor.shape, ABSENT, dtype=torch.int32)
    given[path.value] = path.shadow
    numbers = {value: tensor.double() for value, tensor in given.items()} if node.op.name in POOLS else given
    out = rerun(node, numbers)
    if out is None:
        return [path.ended(node.op.name)]
    moved = []
    for value, shadow in zip(node.outputs, out, strict=True):
        shadow = shadow.to(torch.int32)
        if bool((shadow >= 0).any()):
            after = replace(path, value=value, shadow=shadow)
            first = not path.taken and len(after.units) < len(path.scale_U)
            moved.append(replace(after, taken=tuple(after.units.tolist())) if first else after)
    return moved


def _scaled(graph: Graph, path: Path, node: Node, number: ScalarMap, biased: bool) -> list[Path]:
    """A number that multiplies or is added: part of the pattern where a gate comes behind it, else nothing."""
    taken = number_map(path, node, number)
    gated = [] if taken.end else [end for end in _ends(graph, taken, biased) if end.gate is not None]
    return gated or [path.ended(node.op.name)]


def _aggregated(graph: Graph, path: Path, node: Node, biased: bool) -> Path:
    spread = spread_shadow(path.shadow, graph.shapes[node.outputs[0]])
    if path.trail is None or biased or path.scaled or path.norm is not None or spread is None:
        return path.ended(node.op.name)
    return replace(
        path,
        value=node.outputs[0],
        shadow=spread,
        trail=(*path.trail, node),
        unit_axis=-1,
        gathered=True,
        lifts=len(path.trail) + 1 if mixes(node, path.value) else path.lifts,
    )
