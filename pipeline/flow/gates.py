"""A unit's gate as a function of its pre-activation, whatever layout or number of operations the model used.

Layer 1. A gate is replayed from recorded operations with the units last; per-channel parameters (PReLU) become one
number per unit, so that the gate of a view is the gate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional

from pipeline.flow.numbers import scalar_map
from pipeline.flow.operators import DROPOUTS, ELEMENTWISE, LINEAR_ELEMENTWISE, NONLINEAR, words
from pipeline.flow.record import Fixed, Graph, Node, fixed_in, replay
from pipeline.flow.values import Origin, Value

Apply = Callable[[torch.Tensor], torch.Tensor]
_SUMS = words("add sub")
_TRUTHS = words("gt ge lt le eq ne logical_and logical_or logical_not isnan isinf isfinite")
_CONVERSIONS = words("to _to_copy type_as")
# operations whose arguments decide which function they are
_NAMED_BY_NUMBERS = words("clamp clamp_min clip hardtanh threshold maximum max minimum min where pow mul")
# Elementwise maps by parameters that are a bias or a scale of the units.
CHANNEL_MAPS = words("add sub mul div true_divide")
# operations after a gate that may still belong to it
_LONGEST_TAIL = 2
PASSING = words("to _to_copy contiguous clone detach alias type_as") | DROPOUTS


@dataclass(frozen=True, eq=False)
class Gate:
    """The elementwise nonlinearity behind a site: `apply` maps z (…, U) to a; `output` is where the model has it.

    `of_units` gives it for some of the call's units where it has a number for each, None where it has none.
    """

    name: str
    apply: Apply
    output: Value
    nodes: tuple[Node, ...]
    of_units: Callable[[torch.Tensor], Apply] | None = None

    def among(self, units: torch.Tensor | None) -> Gate:
        """The gate of some of the call's units; None: of all."""
        if units is None or self.of_units is None:
            return self
        return replace(self, apply=self.of_units(units), of_units=None)


def find_gate(
    graph: Graph, value: Value, per_unit: Callable[[Value, torch.Tensor], torch.Tensor | None]
) -> Gate | None:
    """The first elementwise nonlinear function that is computed from `value` alone; None if there is none.

    `per_unit` gives a fixed operand of an elementwise operation as one number per unit, None where it is not so.
    """
    nodes = _computed_from(graph, value)
    if nodes and _is_folded_later(graph, value, nodes[0]):
        return None
    closed = _with_numbers(graph, _closed_prefix(graph, value, nodes) or _first_nonlinear(value, nodes))
    gate = None if closed is None else _gate(graph, value, closed, per_unit)
    if closed is None or gate is None or _begins_norm(graph, value, gate):
        return None
    for more in range(1, _LONGEST_TAIL + 1):
        # relu, then square: one gate only if that has a name
        longer = _extended(graph, closed, more)
        named = None if longer is None else _gate(graph, value, longer, per_unit)
        if named is not None and named.name in _KNOWN.keys() - {gate.name}:
            return named
    # z is what the gate reads: a number that comes before it is part of the pattern
    before = gate.name not in _KNOWN and len(graph.consumers(value)) == 1 and scalar_map(nodes[0]) is not None
    return None if before else gate


def _gate(
    graph: Graph, value: Value, nodes: list[Node], per_unit: Callable[[Value, torch.Tensor], torch.Tensor | None]
) -> Gate | None:
    fixed = _fixed_per_unit(graph, nodes, per_unit)
    if fixed is None:
        return None
    apply = _replayed(value, nodes, fixed)

    def of_units(units: torch.Tensor) -> Apply:
        # one number per unit is the last axis of every operand
        chosen = {held: one[units.to(one.device)] if one.numel() > 1 else one for held, one in fixed.items()}
        return _replayed(value, nodes, chosen)

    return Gate(_name(nodes, apply), apply, nodes[-1].outputs[0], tuple(nodes), of_units if fixed else None)


def _begins_norm(graph: Graph, value: Value, gate: Gate) -> bool:
    """Whether a square or modulus is only taken for the value's size: a sum of it, or what else reads it, tells."""
    if gate.name not in ("square", "abs"):
        return False
    within = {value, *(out for node in gate.nodes for out in node.outputs)} - {gate.output}
    others = [reader for held in within for reader in graph.consumers(held) if reader not in gate.nodes]
    summed = any(reader.op.name in ("mean", "sum") for reader in graph.consumers(gate.output))
    return bool(others) or summed


def _is_folded_later(graph: Graph, value: Value, node: Node) -> bool:
    """Whether all that reads the value is a map by parameters, per channel: a bias or a scale, no gate."""
    fixed = [arg for arg in node.args if isinstance(arg, Fixed)]
    learned = node.op.name in CHANNEL_MAPS and any(arg.value.origin is Origin.PARAMETER for arg in fixed)
    return learned and len(graph.consumers(value)) == 1


def _extended(graph: Graph, nodes: list[Node], more: int) -> list[Node] | None:
    longer = list(nodes)
    for _ in range(more):
        readers = graph.consumers(longer[-1].outputs[0])
        if len(readers) != 1 or not _elementwise(graph, readers[0]) or len(readers[0].inputs) != 1:
            return None
        longer.append(readers[0])
    return longer


def _computed_from(graph: Graph, value: Value) -> list[Node]:
    """The elementwise operations, in order, of which every data operand comes from `value`."""
    inside, nodes = {value}, []
    waiting = {node.index: node for node in graph.consumers(value)}
    while waiting:
        node = waiting.pop(min(waiting))
        if _elementwise(graph, node) and set(node.inputs) <= inside:
            nodes.append(node)
            inside.update(node.outputs)
            waiting.update({reader.index: reader for reader in graph.consumers(node.outputs[0])})
    return nodes


def _elementwise(graph: Graph, node: Node) -> bool:
    if len(node.outputs) != 1 or node.op.name not in ELEMENTWISE | PASSING:
        return False
    # a mask or a running state is no part of a function of z alone
    fixed = [arg for arg in fixed_in(node) if arg.value.origin is Origin.CONSTANT and arg.tensor.numel() > 1]
    return not fixed and all(graph.shapes[value] == graph.shapes[node.outputs[0]] for value in node.inputs)


def _closed_prefix(graph: Graph, value: Value, nodes: Sequence[Node]) -> list[Node] | None:
    # the shortest run of nodes after which only its last result is still read by the others
    members = set(nodes)
    for count, node in enumerate(nodes, start=1):
        done = set(nodes[:count])
        made = {value, *(out for earlier in nodes[:count] for out in earlier.outputs)}
        open_ = {v for v in made for reader in graph.consumers(v) if reader in members and reader not in done}
        if open_ <= set(node.outputs):
            needed = _needed(nodes[:count])
            if any(_is_nonlinear(one) for one in needed):
                return needed
    return None


def _with_numbers(graph: Graph, nodes: list[Node] | None) -> list[Node] | None:
    """The operations up to where truth values are numbers again; None where they only choose (a threshold, a mask)."""
    if nodes is None or nodes[-1].op.name not in _TRUTHS:
        return nodes
    readers = graph.consumers(nodes[-1].outputs[0])
    made = readers[0] if len(readers) == 1 and readers[0].op.name in _CONVERSIONS else None
    return None if made is None or made.args[0] is not nodes[-1].outputs[0] else [*nodes, made]


def _is_nonlinear(node: Node) -> bool:
    if node.op.name in LINEAR_ELEMENTWISE:
        return len(node.inputs) > 1 and node.op.name not in _SUMS
    return node.op.name not in PASSING


def _first_nonlinear(value: Value, nodes: Sequence[Node]) -> list[Node] | None:
    for node in nodes:
        if node.op.name in NONLINEAR and node.inputs == (value,):
            return [node]
    return None


def _needed(nodes: Sequence[Node]) -> list[Node]:
    """Those of the operations that the result of the last is made by: the others may be read elsewhere."""
    wanted, kept = set(nodes[-1].outputs), []
    for node in reversed(nodes):
        if wanted & set(node.outputs):
            kept.append(node)
            wanted |= set(node.inputs)
    return kept[::-1]


def _fixed_per_unit(
    graph: Graph, nodes: Sequence[Node], per_unit: Callable[[Value, torch.Tensor], torch.Tensor | None]
) -> dict[Value, torch.Tensor] | None:
    fixed: dict[Value, torch.Tensor] = {}
    for node in nodes:
        for arg in (*node.args, *node.kwargs.values()):
            if isinstance(arg, Fixed) and arg.tensor.numel() > 1:
                trailing = len(graph.shapes[node.inputs[0]]) - 2
                along = arg.tensor.view(-1, *[1] * trailing) if _is_prelu(node) else arg.tensor
                numbers = per_unit(node.inputs[0], along)
                if numbers is None:
                    return None
                fixed[arg.value] = numbers
    return fixed


def _is_prelu(node: Node) -> bool:
    return node.op.name in ("prelu", "_prelu_kernel")


def _prelu(z: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.where(z > 0, z, z * weight)


def _replayed(value: Value, nodes: Sequence[Node], fixed: Mapping[Value, torch.Tensor]) -> Apply:
    steps = [(_out_of_place(node), node) for node in nodes]
    if len(steps) == 1 and not fixed:
        run, node = steps[0]
        rest, keywords = replay(node.args[1:], {}), replay(node.kwargs, {})
        if node.args[0] is value and not any(isinstance(arg, Value) for arg in node.args[1:]):
            return lambda z: run(z, *rest, **keywords)

    def apply(z: torch.Tensor) -> torch.Tensor:
        given = {**fixed, value: z}
        for run, node in steps:
            given[node.outputs[0]] = run(*replay(node.args, given), **replay(node.kwargs, given))
        return given[nodes[-1].outputs[0]]

    return apply


def _out_of_place(node: Node) -> Callable[..., Any]:
    if _is_prelu(node):
        return _prelu
    if not node.op.writes:
        return node.func
    packet = getattr(torch.ops.aten, node.op.name)
    overload = node.func._overloadname
    if overload in packet.overloads():
        return getattr(packet, overload)  # type: ignore[no-any-return]
    func = node.func
    return lambda z, *rest, **keywords: func(z.clone(), *rest, **keywords)


_GRID = torch.linspace(-9, 9, 145, dtype=torch.float64)
# Composite gates are named by what they compute, not by how it was written.
_KNOWN: dict[str, Apply] = {
    "relu": functional.relu,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda z: functional.gelu(z, approximate="tanh"),
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "relu_squared": lambda z: functional.relu(z).square(),
    "mish": functional.mish,
    "hardswish": functional.hardswish,
    "hardsigmoid": functional.hardsigmoid,
    "relu6": functional.relu6,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": functional.softplus,
    "elu": functional.elu,
    "selu": functional.selu,
    "softsign": functional.softsign,
    "tanhshrink": functional.tanhshrink,
    "log_sigmoid": functional.logsigmoid,
    "leaky_relu": functional.leaky_relu,
    "sin": torch.sin,
    "abs": torch.abs,
    "square": torch.square,
}


def _name(nodes: Sequence[Node], apply: Apply) -> str:
    names = [node.op.name for node in nodes if node.op.name not in PASSING]
    if len(names) == 1:
        name = names[0].removeprefix("_").removesuffix("_kernel")
        if name == "gelu" and nodes[0].kwargs.get("approximate", "none") == "tanh":
            return "gelu_tanh"
        if name not in _NAMED_BY_NUMBERS:
            return name
    fixed = [arg.tensor.device for node in nodes for arg in fixed_in(node)]
    grid = _GRID.to(fixed[0]) if fixed else _GRID
    try:
        made = apply(grid.clone()).double().cpu()
    except RuntimeError:
        return "_".join(names)
    for name, function in _KNOWN.items():
        if made.shape == _GRID.shape and torch.allclose(made, function(_GRID), atol=1e-5, rtol=1e-4):
            return name
    return "_".join(names)
