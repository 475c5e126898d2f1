"""Turns one recorded affine call into the plans of its sites: patterns folded, gates found, parts named.

Layer 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from pipeline.flow.affine import Affine
from pipeline.flow.aggregate import from_neighbours
from pipeline.flow.follow import follow
from pipeline.flow.gains import Gain, gain_of
from pipeline.flow.operators import words
from pipeline.flow.parts import Pair, Part, divide
from pipeline.flow.patches import Geometry
from pipeline.flow.path import Path, plain_of, unit_axis
from pipeline.flow.plan import Branch, CallKey, Scaling, SitePlan
from pipeline.flow.record import Graph, Node, fixed_names
from pipeline.flow.spaces import Spaces
from pipeline.flow.told import Told, bias_of
from pipeline.flow.transposed import Phase
from pipeline.flow.watch import due_of, readers_of
from pipeline.sites import Site

# of what is done to z, gates that are read in some forms only, and moves behind which none is looked for
_HIDING = words("glu index_put index_copy pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle")


@dataclass(frozen=True, eq=False)
class Named:
    """A recorded affine call as its sites are named: by path and slice of the weight and the number of the call."""

    node: Node
    affine: Affine
    path: str
    slice: str
    call: int
    tied: str | None

    @property
    def key(self) -> CallKey:
        """How the call is recognised."""
        return key_of(self.node, self.affine)

    def name(self, label: str) -> str:
        """The site's name, with the label of a part."""
        return f"{self.path}{self.slice}{label}" + (f"#{self.call}" if self.call else "")

    @property
    def place(self) -> str:
        """The call, whatever its sites are named."""
        return self.name("")


def key_of(node: Node, affine: Affine) -> CallKey:
    """How a call is recognised: by its operation and the origin of its weight."""
    return (node.op.name, affine.weight_value.key)


def ends_of(graph: Graph, node: Node, affine: Affine) -> list[Path]:
    """Where the output of an affine call goes."""
    units = affine.geometry.matrix_UD(affine.weight).shape[0]
    if isinstance(affine.geometry, Phase):
        units = int(graph.shapes[node.outputs[0]][affine.geometry.unit_axes[0]])
    biased = affine.bias is not None
    return follow(graph, node.outputs[0], units=units, unit_axes=affine.geometry.unit_axes, biased=biased)


def plans_of(graph: Graph, named: Named, ends: Sequence[Path], pair: Pair | None, spaces: Spaces) -> list[SitePlan]:
    """The plans of the sites of one call, with index −1 still."""
    if pair is not None:
        return [_pair_plan(graph, named, pair, spaces)]
    phases = _phases(named.affine.geometry)
    weight = named.affine.weight.detach()
    units = phases[0].matrix_UD(weight).shape[0]
    parts = divide(ends, units, named.path)
    plans = [_plan(graph, named, part, one, spaces) for part in parts for one in phases]
    return [_noting_reader(plan, ends) for plan in plans]


def _noting_reader(plan: SitePlan, ends: Sequence[Path]) -> SitePlan:
    """The plan, with a note where an operation that may be a gate, or come before one, reads what has none."""
    units = None if plan.part is None else set(plan.part.tolist())
    found = [
        end.end
        for end in ends
        if end.end in _HIDING
        and end.last is not None
        and end.last.args[0] is end.value
        and (units is None or not units.isdisjoint(end.units.tolist()))
    ]
    if plan.site.gate != "identity" or not found:
        return plan
    note = f"its output meets {found[0]}: what gate that is, or has behind it, is not read"
    return replace(plan, site=replace(plan.site, note="; ".join(filter(None, [plan.site.note, note]))))


def plain_plans(named: Named, spaces: Spaces, note: str) -> list[SitePlan]:
    """The call's own output, followed nowhere."""
    affine, plans = named.affine, []
    for geometry in _phases(affine.geometry):
        raw_UD, bias_U = _weights(affine, geometry)
        phase, label = _phase(geometry)
        site = Site(
            name=named.name(label),
            path=named.path,
            call=named.call,
            index=-1,
            kind=geometry.kind,
            gate="identity",
            pattern_UD=raw_UD,
            bias_U=bias_U,
            raw_UD=raw_UD,
            inputs=spaces.of(affine, geometry),
            groups=geometry.groups,
            note=note,
        )
        names = affine.weight_value.names | (affine.bias_value.names if affine.bias_value is not None else frozenset())
        plans.append(SitePlan(site, names, phase=phase, bias=bias_of(affine)))
    return plans


def _phases(geometry: Geometry) -> Sequence[Geometry]:
    return geometry.phases() if isinstance(geometry, Phase) else [geometry]


class _Folded(NamedTuple):
    """Of all units of a call: the weights, and what becomes of them and of the bias with all that is folded."""

    raw_UD: torch.Tensor
    pattern_UD: torch.Tensor
    bias_U: torch.Tensor


def _folded(affine: Affine, geometry: Geometry, gain: Gain | None, end: Path) -> _Folded:
    """The gain before an affine call and the scaling behind it, folded into its pattern."""
    raw_UD, bias_U = _weights(affine, geometry)
    pattern_UD, shifted_U = _gained(raw_UD, bias_U, gain)
    return _Folded(raw_UD, pattern_UD * end.scale_U[:, None], shifted_U * end.scale_U + end.shift_U)


class _Meeting(NamedTuple):
    """Where z is met: `is_met` at the end of a path, `meets_gate` one operation before, else it is computed."""

    end: Path
    is_met: bool
    meets_gate: bool
    unit_axis: int


def _meeting(part: Part, geometry: Geometry) -> _Meeting:
    end = part.end
    meets_gate = _meets_gate(end, part)
    axis = (_gate_axis(end) if meets_gate else None) or end.unit_axis
    if isinstance(geometry, Phase) and (axis,) != geometry.unit_axes:
        # the outputs of a phase are known in the call's own layout only
        return _Meeting(end if end.norm is None else plain_of(end), False, False, axis)
    return _Meeting(end, _met(end, part), meets_gate, axis)


def _plan(graph: Graph, named: Named, part: Part, geometry: Geometry, spaces: Spaces) -> SitePlan:
    affine, gain = named.affine, gain_of(graph, named.affine)
    phase, label = _phase(geometry)
    folded = _folded(affine, geometry, gain, part.end)
    end, is_met, meets_gate, axis = _meeting(part, geometry)
    trail = _trail(end, meets_gate=meets_gate) if is_met or meets_gate else ()
    chosen = slice(None) if part.units is None else part.units
    scaling = Scaling(end.scale_U[chosen], end.shift_U[chosen])
    groups, group_part = _grouped(geometry, len(folded.raw_UD), part.units)
    site = Site(
        name=named.name(part.label + label),
        path=named.path,
        call=named.call,
        index=-1,
        kind="graph" if end.lifts or from_neighbours(graph, affine.x_value) else geometry.kind,
        gate=end.gate.name if end.gate is not None else "identity",
        pattern_UD=folded.pattern_UD[chosen],
        bias_U=folded.bias_U[chosen],
        raw_UD=folded.raw_UD[chosen],
        inputs=spaces.of(affine, geometry),
        groups=groups,
        norm=end.norm,
        folded=(*(() if gain is None else (gain.norm,)), *end.folded),
        note=_note(end),
    )
    return SitePlan(
        site,
        names=_names(affine, end, gain),
        gate=None if end.gate is None else end.gate.among(part.units),
        part=part.units,
        group_part=group_part,
        scaling=None if is_met or meets_gate or scaling.is_identity else scaling,
        trail=tuple(node.op.name for node in trail),
        told=tuple(map(Told.of, trail)),
        due=due_of(end, passed=trail),
        readers=readers_of(graph, named.node.outputs[0]) if end.gate is None else None,
        bias=bias_of(affine),
        meets_gate=meets_gate,
        unit_axis=axis,
        before=None if end.norm is None else scaling,
        lifts=end.lifts,
        gain=frozenset() if gain is None else gain.keys,
        phase=phase,
    )


def _weights(affine: Affine, geometry: Geometry) -> tuple[torch.Tensor, torch.Tensor]:
    raw_UD = geometry.matrix_UD(affine.weight.detach()).double().cpu().contiguous()
    bias_U = torch.zeros(len(raw_UD), dtype=torch.float64)
    if affine.bias is not None:
        bias_U = bias_U + affine.bias.detach().double().cpu().reshape(-1)
    return raw_UD, bias_U


def _gained(raw_UD: torch.Tensor, bias_U: torch.Tensor, gain: Gain | None) -> tuple[torch.Tensor, torch.Tensor]:
    if gain is None:
        return raw_UD, bias_U
    return raw_UD * gain.weight_D, bias_U + raw_UD @ gain.bias_D


def _met(end: Path, part: Part) -> bool:
    """Whether z is met in the model at the end of a trail, all units of it."""
    return bool(end.trail) and (part.units is None or len(end.units) == len(end.scale_U))


def _meets_gate(end: Path, part: Part) -> bool:
    """Whether the gate is one operation on the model's own z."""
    if end.gate is None or part.units is not None or end.trail is None or len(end.gate.nodes) != 1:
        return False
    return _gate_axis(end) is not None


def _gate_axis(end: Path) -> int | None:
    return unit_axis(end.shadow, len(end.scale_U), likeliest=end.unit_axis)


def _trail(end: Path, *, meets_gate: bool) -> tuple[Node, ...]:
    gate = end.gate.nodes if end.gate is not None and meets_gate else ()
    return (*(end.trail or ()), *gate)


def _phase(geometry: Geometry) -> tuple[tuple[int, ...] | None, str]:
    if not isinstance(geometry, Phase):
        return None, ""
    one = all(axis.stride == 1 for axis in geometry.axes)
    return geometry.phase, "" if one else ".phase" + "x".join(map(str, geometry.phase))


def _grouped(geometry: Geometry, of: int, units: torch.Tensor | None) -> tuple[int, torch.Tensor | None]:
    """The groups of some of a call's units, and which of its they are (None: all): one per unit where uneven."""
    if geometry.groups == 1 or units is None:
        return geometry.groups, None
    of_unit = units // (of // geometry.groups)
    groups, counts = torch.unique_consecutive(of_unit, return_counts=True)
    if bool((counts == counts[0]).all()):
        return len(groups), groups
    return len(units), of_unit


def _note(end: Path) -> str | None:
    if not end.shadow.numel():
        return "the probe batch shows it nothing: what becomes of its output is not known"
    if end.norm is not None and end.over_batch:
        return "its norm has no running statistics and takes them from each batch: z depends on the rows beside it"
    if not end.turned:
        return None
    return f"of {end.turned} units with a negative gain behind it, the max-pooling keeps the smallest z"


def _names(affine: Affine, end: Path, gain: Gain | None) -> frozenset[str]:
    names = affine.weight_value.names | end.fixed
    if affine.bias_value is not None:
        names |= affine.bias_value.names
    if end.gate is not None:
        names |= fixed_names(end.gate.nodes)
    return names if gain is None else names | gain.names


def _pair_plan(graph: Graph, named: Named, pair: Pair, spaces: Spaces) -> SitePlan:
    affine, other = named.affine, pair.up.affine
    assert other is not None
    gain = gain_of(graph, affine)
    gate_end, up_end = pair.gate_end, pair.up_end
    folded = _folded(affine, affine.geometry, gain, gate_end)
    chosen, up_chosen = pair.gate_units, pair.up_units
    groups, group_part = _grouped(affine.geometry, len(folded.raw_UD), chosen)
    same_call = pair.up is named.node
    partner = "the other half of its units" if same_call else f"the units of {sorted(other.weight_value.names)[0]}"
    site = Site(
        name=named.name(""),
        path=named.path,
        call=named.call,
        index=-1,
        kind=affine.geometry.kind,
        gate=pair.gate.name,
        pattern_UD=folded.pattern_UD[chosen],
        bias_U=folded.bias_U[chosen],
        raw_UD=folded.raw_UD[chosen],
        inputs=spaces.of(affine, affine.geometry),
        groups=groups,
        folded=(*(() if gain is None else (gain.norm,)), *gate_end.folded),
        up_UD=_folded(other, other.geometry, gain, up_end).pattern_UD[up_chosen],
        note=f"gated pair: a = gate(z) × {partner}",
    )
    names = _names(affine, gate_end, gain) | _names(other, up_end, None) | fixed_names(pair.gate.nodes)
    return SitePlan(
        site,
        names=names,
        gate=pair.gate.among(chosen),
        part=chosen,
        group_part=group_part,
        scaling=_scaling(gate_end, chosen),
        gain=frozenset() if gain is None else gain.keys,
        due=due_of(gate_end),
        bias=bias_of(affine),
        branch=Branch(
            up_chosen,
            _scaling(up_end, up_chosen),
            None if same_call else key_of(pair.up, other),
            bias_of(other),
            due_of(up_end),
        ),
    )


def _scaling(end: Path, chosen: torch.Tensor) -> Scaling | None:
    scaling = Scaling(end.scale_U[chosen], end.shift_U[chosen])
    return None if scaling.is_identity else scaling
