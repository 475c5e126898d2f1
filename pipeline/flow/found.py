"""The calls of a recorded probe that are sites: affine maps, recurrent layers, factorisation machines; named, in order.

Layer 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from pipeline.flow.assemble import Named, ends_of, key_of, plain_plans, plans_of
from pipeline.flow.cells import cell_plans, key_of_cells, rows_of_cells
from pipeline.flow.machines import (
    Machine,
    carries_rows,
    find_machines,
    machine_of_product,
    machine_plan,
    product_plan,
)
from pipeline.flow.naming import path_of, slice_label
from pipeline.flow.parts import Pair, find_pair
from pipeline.flow.path import Path
from pipeline.flow.plan import CallKey, SitePlan
from pipeline.flow.record import Fixed, Node, Recorder
from pipeline.flow.recurrent import SINGLE, weights_of
from pipeline.flow.rows import Rows
from pipeline.flow.spaces import Spaces


@dataclass(frozen=True)
class Trust:
    """How far a call's reading is trusted: to its fold and gate (2), its own output alone (1), not at all (0)."""

    level: int = 2
    reason: str = ""

    def less(self, reason: str) -> Trust:
        """One step down."""
        return Trust(self.level - 1, reason)


@dataclass(frozen=True, eq=False)
class FoundCall:
    """One call that is a site, or several.

    place    its path and number: what it is called before its sites are named
    weights  the parameters and buffers that it accounts for
    rows     of its input; None where they cannot be followed, and it cannot be presented
    fate     calls of one weight can be one site only where this is equal
    loops    its calls are steps of a recurrence: one site however many they are
    make     its plans, under a given trust
    also     other calls that present its sites: the second branch of a gated pair
    """

    node: Node
    key: CallKey
    place: str
    weights: frozenset[str]
    rows: Rows | None
    make: Callable[[Trust], list[SitePlan]]
    tied: str | None = None
    fate: object = ()
    loops: bool = False
    also: tuple[Node, ...] = ()


def key_of_node(node: Node) -> CallKey | None:
    """How a recorded call is recognised at measure time, if it can be a site."""
    if node.affine is not None:
        return key_of(node, node.affine)
    return key_of_cells(node)


def find_calls(model: nn.Module, recorder: Recorder, trust: Mapping[str, Trust]) -> list[FoundCall]:
    """Every call that is a site, in forward order."""
    named = _named(model, recorder)
    found = [*_affine(recorder, named, trust), *_cells(recorder), *_machines(recorder)]
    return sorted(found, key=lambda call: call.node.index)


class _Counter:
    """Numbers the calls of each path."""

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}

    def next(self, path: str) -> int:
        self._seen[path] = self._seen.get(path, -1) + 1
        return self._seen[path]


def _named(model: nn.Module, recorder: Recorder) -> list[Named]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    counter, named = _Counter(), []
    for node in recorder.graph.nodes:
        if node.affine is not None:
            weight = node.affine.weight_value
            path, tied = path_of(weight.names, parameters, node.module)
            only = parameters.get(next(iter(weight.names))) if len(weight.names) == 1 else None
            label = "" if only is None else slice_label(path, node.affine.weight, only)
            named.append(Named(node, node.affine, path, label, counter.next(path + label), tied))
    return named


def _affine(recorder: Recorder, named: list[Named], trust: Mapping[str, Trust]) -> list[FoundCall]:
    graph, spaces = recorder.graph, Spaces(recorder.graph)
    trusted = [one for one in named if trust.get(one.place, Trust()).level == 2]
    ends = {one.node: ends_of(graph, one.node, one.affine) for one in trusted}
    pairs = {node: pair for node in ends if (pair := find_pair(graph, node, ends[node], ends)) is not None}
    ups = {pair.up for node, pair in pairs.items() if pair.up is not node}
    machines = {one.node: squares for one in trusted if (squares := machine_of_product(graph, one.node)) is not None}
    found = []
    for one in named:
        if one.node in ups or one.node in machines.values():
            continue
        if one.node in machines:
            found.append(_product_machine(one))
            continue
        pair = pairs.get(one.node)
        found.append(
            FoundCall(
                one.node,
                one.key,
                one.place,
                names_of(one),
                _rows_of(one),
                _maker(recorder, one, ends, pair, spaces),
                one.tied,
                _fate(ends.get(one.node, [])),
                also=() if pair is None else (pair.up,),
            )
        )
    return found


def _product_machine(one: Named) -> FoundCall:
    def make(trust: Trust) -> list[SitePlan]:
        return [product_plan(one.node, one.place, one.path, one.call)] if trust.level == 2 else []

    return FoundCall(one.node, one.key, one.place, names_of(one), _rows_of(one), make, one.tied)


def _maker(
    recorder: Recorder, one: Named, ends: Mapping[Node, list[Path]], pair: Pair | None, spaces: Spaces
) -> Callable[[Trust], list[SitePlan]]:
    def make(trust: Trust) -> list[SitePlan]:
        plans: list[SitePlan] = []
        if trust.level == 2:
            plans = plans_of(recorder.graph, one, ends[one.node], pair, spaces)
        elif trust.level == 1:
            plans = plain_plans(one, spaces, f"its own output alone; followed to fold and gate, {trust.reason}")
        if pair is None:
            spaces.know(one.node, plans)
        elif plans:
            spaces.know(one.node, plans, output=pair.product, where=pair.gate_end.shadow >= 0)
        return plans

    return make


def names_of(one: Named) -> frozenset[str]:
    """The parameters and buffers of an affine call's weight and bias."""
    bias = one.affine.bias_value
    return one.affine.weight_value.names | (frozenset() if bias is None else bias.names)


def _rows_of(one: Named) -> Rows | None:
    rows = one.affine.x_value.rows
    if rows is None or one.node.outputs[0].rows is None or not one.affine.geometry.carries(rows):
        return None
    return rows


def _fate(ends: list[Path]) -> object:
    return tuple((end.gate.name if end.gate else "", end.folded, end.norm) for end in ends)


def _cells(recorder: Recorder) -> list[FoundCall]:
    counter, found = _Counter(), []
    for node in recorder.graph.nodes:
        key = key_of_cells(node)
        if key is None:
            continue
        layers = weights_of(node.op.name, node.args)
        names = [part.value.names for layer in layers for part in layer[2:] if isinstance(part, Fixed)]
        path = sorted(layers[0].input.value.names)[0]
        number = counter.next(path)

        def make(trust: Trust, node: Node = node, number: int = number) -> list[SitePlan]:
            return cell_plans(node, number) if trust.level == 2 else []

        place = f"{path}#{number}"
        loops = node.op.name in SINGLE
        found.append(
            FoundCall(node, key, place, frozenset[str]().union(*names), rows_of_cells(node), make, loops=loops)
        )
    return found


def _machines(recorder: Recorder) -> list[FoundCall]:
    counter, found = _Counter(), []
    for machine in find_machines(recorder.graph, recorder.rows):
        number = counter.next(machine.path)
        name = f"{machine.path}#{number}" if number else machine.path

        def make(trust: Trust, machine: Machine = machine, name: str = name, number: int = number) -> list[SitePlan]:
            return [machine_plan(machine, name, number)] if trust.level == 2 else []

        rows = machine.node.outputs[0].rows
        known = rows if carries_rows(rows) else None
        found.append(FoundCall(machine.node, machine.key, name, machine.names, known, make))
    return found
