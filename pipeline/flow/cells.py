"""The sites of recurrent calls: their plans from a recorded call, their presentations from a replayed one.

Layer 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.flow.gates import Gate
from pipeline.flow.plan import CallKey, SitePlan
from pipeline.flow.record import Fixed, Node
from pipeline.flow.recurrent import (
    CANDIDATE_NOTE,
    GATINGS,
    PROJECTION,
    CellPart,
    Gating,
    Replay,
    Weights,
    cell_path,
    family,
    is_recurrent,
    replays,
    states_of,
    time_axis,
    weights_of,
)
from pipeline.flow.rows import Rows
from pipeline.flow.values import Call, Origin
from pipeline.sites import InputSpace, Site

_GATES: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
}


@dataclass(frozen=True, eq=False)
class Presented:
    """One site of a replayed call: x and z with the leading axes of the call's input."""

    plan: SitePlan
    x: torch.Tensor
    z: torch.Tensor


def key_of_cells(node: Node) -> CallKey | None:
    """How a recurrent call with learned weights is recognised; None for any other operation."""
    if not is_recurrent(node.op.name):
        return None
    first = weights_of(node.op.name, node.args)[0].input
    return (node.op.name, first.value.key) if isinstance(first, Fixed) else None


def live_key(call: Call, key_of: Callable[[torch.Tensor], int]) -> CallKey:
    """The same key from a running call."""
    return (call.op.name, key_of(weights_of(call.op.name, call.args)[0].input))


def cell_plans(node: Node, call: int) -> list[SitePlan]:
    """The plans of every layer, direction and gate of a recorded call."""
    plans = []
    for weights in weights_of(node.op.name, node.args):
        gatings = GATINGS[family(node.op.name)] + ((PROJECTION,) if weights.projection is not None else ())
        plans += [_plan(node, weights, gating, call) for gating in gatings]
    return plans


def _plan(node: Node, weights: Weights, gating: Gating, call: int) -> SitePlan:
    path, label = cell_path(sorted(weights.input.value.names), weights)
    pattern_UD, bias_U = _pattern(family(node.op.name), weights, gating)
    used = [part for part in weights[2:] if isinstance(part, Fixed)]
    apply = _GATES.get(gating.gate)
    site = Site(
        name=f"{path}{label}.{gating.label}".removeprefix(".") + (f"#{call}" if call else ""),
        path=path,
        call=call,
        index=-1,
        kind=family(node.op.name).partition("_")[0],
        gate=gating.gate,
        pattern_UD=pattern_UD,
        bias_U=bias_U,
        raw_UD=pattern_UD,
        inputs=_space(weights, gating),
        note=CANDIDATE_NOTE if gating.gate == "null" else None,
    )
    return SitePlan(
        site,
        frozenset[str]().union(*[part.value.names for part in used]),
        gate=None if apply is None else Gate(gating.gate, apply, node.outputs[0], ()),
        cell=CellPart(weights.layer, weights.reverse, gating),
    )


def _pattern(name: str, weights: Weights, gating: Gating) -> tuple[torch.Tensor, torch.Tensor]:
    if gating is PROJECTION:
        projection_UD = _number(weights.projection)
        return projection_UD, torch.zeros(len(projection_UD), dtype=torch.float64)
    blocks = 1 + max(one.block for one in GATINGS[name])
    wholes, biases = [], []
    for seen, weight, bias in (
        (gating.sees_input, weights.input, weights.input_bias),
        (gating.sees_hidden, weights.hidden, weights.hidden_bias),
    ):
        if seen:
            wholes.append(_number(weight).chunk(blocks)[gating.block])
            biases.append(None if bias is None else _number(bias).chunk(blocks)[gating.block])
    known = [bias for bias in biases if bias is not None]
    zeros = torch.zeros(len(wholes[0]), dtype=torch.float64)
    return torch.cat(wholes, 1), sum(known, start=zeros)


def _number(weight: Fixed) -> torch.Tensor:
    return weight.tensor.detach().double().cpu()


def _space(weights: Weights, gating: Gating) -> InputSpace:
    if gating is PROJECTION:
        return InputSpace("units", (int(weights.projection.tensor.shape[1]),))
    inputs, hidden = int(weights.input.tensor.shape[1]), int(weights.hidden.tensor.shape[1])
    names = [f"x[{i}]" for i in range(inputs)] if gating.sees_input else []
    names += [f"h[{i}]" for i in range(hidden)] if gating.sees_hidden else []
    return InputSpace("features", (len(names),), names=tuple(names))


def rows_of_cells(node: Node) -> Rows | None:
    """The rows of a recorded call's input; None where they would be its steps."""
    value = node.args[0]
    if isinstance(value, Fixed) or value.origin is not Origin.DATA:
        return None
    steps = time_axis(node.op.name, node.args)
    return None if value.rows is not None and steps is not None and value.rows.axis == steps else value.rows


def presented(call: Call, out: Any, plans: Sequence[SitePlan]) -> list[Presented]:
    """What each planned site of a running call is shown."""
    made = []
    for replay in replays(call, out):
        for plan in plans:
            cell = plan.cell
            if cell is not None and (cell.layer, cell.reverse) == (replay.weights.layer, replay.weights.reverse):
                made.append(Presented(plan, *_shown(family(call.op.name), replay, cell.gating)))
    return made


def _shown(name: str, replay: Replay, gating: Gating) -> tuple[torch.Tensor, torch.Tensor]:
    if gating == PROJECTION:
        return states_of(name, replay), replay.out_D
    blocks = 1 + max(one.block for one in GATINGS[name])
    parts = [replay.x_D] * gating.sees_input + [replay.hidden_D] * gating.sees_hidden
    z = replay.z_GH
    if not (gating.sees_input and gating.sees_hidden):
        z = replay.input_GH if gating.sees_input else replay.from_hidden_GH
    return torch.cat(parts, -1), z.chunk(blocks, -1)[gating.block]


def deviation(call: Call, out: Any) -> float:
    """max |h rebuilt from the gates' z − h returned| / max(1, |h|) over the layers, the last against the call's own."""
    worst, last = 0.0, list[torch.Tensor]()
    for replay in replays(call, out):
        rebuilt = states_of(family(call.op.name), replay)
        if replay.weights.projection is not None:
            rebuilt = rebuilt @ replay.weights.projection.mT
        last = [*last[-1:], rebuilt] if replay.weights.reverse else [rebuilt]
        worst = max(worst, _distance(rebuilt, replay.out_D))
    returned = out[0] if isinstance(out, list | tuple) else out
    return max(worst, _distance(torch.cat(last, -1), returned))


def _distance(made: torch.Tensor, given: torch.Tensor) -> float:
    difference = (made - given).abs() / given.abs().clamp_min(1)
    finite = difference[torch.isfinite(difference)]
    return float(finite.max()) if len(finite) else 0.0
