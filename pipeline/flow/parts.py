"""Divides the units of one affine call among its gates: fused projections, chunks, gated pairs.

Layer 1. Which units go where is read off the shadows of `follow`; names only name the parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeline.flow.gates import PASSING, Gate
from pipeline.flow.naming import projection_labels
from pipeline.flow.path import Path, plain_of
from pipeline.flow.record import Graph, Node
from pipeline.flow.values import Value


@dataclass(frozen=True, eq=False)
class Part:
    """Some units of a call that share an end; `units` None for all, `label` "" for an unnamed whole."""

    units: torch.Tensor | None
    end: Path
    label: str = ""


@dataclass(frozen=True, eq=False)
class Pair:
    """A gated pair: gate(z of `gate_units`) · z of `up_units`, element by element; `up` is the other branch's call."""

    gate_units: torch.Tensor
    up_units: torch.Tensor
    gate_end: Path
    up: Node
    up_end: Path
    gate: Gate
    product: Value


def divide(ends: Sequence[Path], units: int, path: str) -> list[Part]:
    """The parts of a call: one per fate of its units, and per projection where its name says it is fused."""
    fates: dict[object, tuple[Path, list[int]]] = {}
    for unit, end in enumerate(_chosen(ends, units)):
        fates.setdefault(_fate(end), (end, []))[1].append(unit)
    if len(fates) == 1:
        ((end, _),) = fates.values()
        return _projections(ends, end, units, path)
    return [Part(torch.tensor(members), end, f".{index}") for index, (end, members) in enumerate(fates.values())]


def _chosen(ends: Sequence[Path], units: int) -> list[Path]:
    """For each unit the end that says what becomes of it: its first gate, else where all of it is folded, else none."""
    present = [set(end.units.tolist()) for end in ends]
    plain = plain_of(ends[0])
    chosen = []
    for unit in range(units):
        having = [end for end, members in zip(ends, present, strict=True) if unit in members]
        gated = [end for end in having if end.gate is not None]
        lifted = [end for end in having if end.lifts and end.norm is None]
        folds = {(end.folded, end.fixed) for end in having}
        folded = [end for end in having if end.scaled and end.norm is None and len(folds) == 1]
        chosen.append((gated or lifted or folded or [plain])[0])
    return chosen


def _fate(end: Path) -> object:
    if end.gate is not None:
        return tuple(node.index for node in end.gate.nodes)
    return (end.folded, end.fixed, end.lifts)


def _projections(ends: Sequence[Path], end: Path, units: int, path: str) -> list[Part]:
    subsets = dict.fromkeys(one.taken for one in ends if one.taken)
    labels = projection_labels(path, len(subsets))
    covered = sorted(unit for members in subsets for unit in members)
    if end.gate is not None or labels is None or covered != list(range(units)):
        return [Part(None, end)]
    return [Part(torch.tensor(members), end, label) for members, label in zip(subsets, labels, strict=True)]


def find_pair(graph: Graph, node: Node, ends: Sequence[Path], all_ends: dict[Node, list[Path]]) -> Pair | None:
    """The gated pair of which this call holds the gate branch, None if there is none."""
    for end in ends:
        if end.end == "glu" and not (end.scaled or end.gathered or end.norm):
            dim = end.last.args[1] if end.last is not None and len(end.last.args) > 1 else -1
            up, gate = end.shadow.chunk(2, dim)
            fn = Gate("glu", torch.sigmoid, end.last.outputs[0], (end.last,)) if end.last is not None else None
            units = _matched(gate, up)
            if fn is not None and units is not None and end.last is not None:
                return Pair(*units, end, node, end, fn, end.last.outputs[0])
        if end.gate is not None and end.norm is None and not end.gathered:
            for product in _products(graph, end.gate):
                if (pair := _paired(node, end, product, all_ends)) is not None:
                    return pair
    return None


def _products(graph: Graph, gate: Gate) -> list[Node]:
    """The elementwise products of two tensors that read a gate's output."""
    value, found = gate.output, []
    readers = list(graph.consumers(value))
    for reader in readers:
        if reader.op.name in PASSING:
            readers.extend(graph.consumers(reader.outputs[0]))
        elif reader.op.name == "mul" and len(set(reader.inputs)) == 2:
            found.append(reader)
    return found


def _paired(node: Node, end: Path, product: Node, all_ends: dict[Node, list[Path]]) -> Pair | None:
    for other, candidates in all_ends.items():
        same_x = other.affine is not None and node.affine is not None and other.affine.x_value is node.affine.x_value
        for up_end in candidates:
            if not same_x or up_end.last is not product or up_end.gate is not None or up_end.end != "mul":
                continue
            if up_end.norm is None and not up_end.gathered and up_end.shadow.shape == end.shadow.shape:
                units = _matched(end.shadow, up_end.shadow)
                if units is not None and end.gate is not None:
                    return Pair(*units, end, other, up_end, _named(end.gate), product.outputs[0])
    return None


_PAIR_NAMES = {"sigmoid": "glu", "silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh", "relu": "reglu"}


def _named(gate: Gate) -> Gate:
    return Gate(_PAIR_NAMES.get(gate.name, f"{gate.name}_glu"), gate.apply, gate.output, gate.nodes, gate.of_units)


def _matched(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Which unit of the gate meets which of the other branch: one to one, ascending by gate; None if it is not so."""
    units = int(max(gate.max(), up.max())) + 1
    # where neither is, other calls' units are: of an expert beside others
    here = gate >= 0
    if not torch.equal(here, up >= 0) or not bool(here.any()):
        return None
    joint = torch.unique(gate[here].long() * units + up[here].long())
    pairs = torch.stack([joint // units, joint % units])
    one_to_one = len(torch.unique(pairs[0])) == len(torch.unique(pairs[1])) == pairs.shape[1]
    return (pairs[0], pairs[1]) if one_to_one else None
