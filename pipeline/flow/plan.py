"""What measuring needs to know of each site: how its call is recognised, where z is met, what its gate computes.

Layer 1. Made once by `discover`, read at every batch by `tap`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from pipeline.flow.gates import Gate
from pipeline.flow.recurrent import CellPart
from pipeline.flow.told import Operand, Told
from pipeline.sites import Site, Unread

# A call is recognised by its operation and by how its weight operand was made.
CallKey = tuple[str, int]


@dataclass(frozen=True, eq=False)
class Scaling:
    """A folded map per unit, float64; applied in the dtype of what it is applied to."""

    scale_U: torch.Tensor
    shift_U: torch.Tensor

    @cached_property
    def is_identity(self) -> bool:
        """Whether it changes nothing."""
        return bool((self.scale_U == 1).all()) and bool((self.shift_U == 0).all())

    def apply(self, met_LSU: torch.Tensor) -> torch.Tensor:
        """Scale and shift the last axis."""
        if self.is_identity:
            return met_LSU
        return met_LSU * self.scale_U.to(met_LSU) + self.shift_U.to(met_LSU)


@dataclass(frozen=True, eq=False)
class Branch:
    """The other half of a gated pair: the units `part` of the same call, or of the call `key`.

    bias, due  of that call, as in its plan
    """

    part: torch.Tensor | None
    scaling: Scaling | None
    key: CallKey | None
    bias: Operand | None = None
    due: tuple[Told, ...] = ()


@dataclass(frozen=True, eq=False)
class SitePlan:
    """How one site is read from its call.

    names      parameters and buffers that the site accounts for
    gate       None for identity
    part       the units of the call that are this site's; None if all
    group_part the groups of the call's inputs that are this site's; None if all
    scaling    what is folded and must be computed, because the model has z nowhere in this layout
    trail      the operations (folds, a data-dependent norm, sums over neighbours) whose last one gives z, views between
    told       of each operation of the trail, what the probe told it beside data
    due        what must come behind a presentation in any order: folds and gates that are computed, not met
    readers    of a site without a gate, the nonlinearities that read its output in the probe; None where it has one
    bias       of the call, None where it has none
    meets_gate the trail goes one operation on: its input is z, its output a, and the gate is not computed again
    unit_axis  axis of the units where the trail ends, from the end
    before     the trail ends in a data-dependent norm: what is folded before it gives w·x + b
    lifts      how many operations of the trail sum over neighbours: x is what they make of the call's input
    gain       keys of the norm that feeds the site: x is its input, normalised, before gain and bias
    phase      of a transposed convolution, the output phase
    branch     of a gated pair, the other half
    squares    of a factorisation machine over dense inputs: a is ½(z² − Σ v² x²)
    cell       of a recurrent layer, which gate of which layer
    collected  calls are presented together at the end of the forward, as further positions of their rows
    """

    site: Site
    names: frozenset[str]
    gate: Gate | None = None
    part: torch.Tensor | None = None
    group_part: torch.Tensor | None = None
    scaling: Scaling | None = None
    trail: tuple[str, ...] = ()
    told: tuple[Told, ...] = ()
    due: tuple[Told, ...] = ()
    readers: frozenset[str] | None = None
    bias: Operand | None = None
    meets_gate: bool = False
    unit_axis: int = -1
    before: Scaling | None = None
    lifts: int = 0
    gain: frozenset[int] = frozenset()
    phase: tuple[int, ...] | None = None
    branch: Branch | None = None
    collected: bool = False
    squares: bool = False
    cell: CellPart | None = None


@dataclass(frozen=True, eq=False)
class Discovery:
    """The sites of a model in forward order, and every weight that is no part of one, with the reason.

    calls      for each recognised call, its plans by how often it was called before in the forward
    uneven     the recognised calls of which one behind the first is followed by another gate, or norm, than the next
    gains      the keys of norm gains that are folded into the site behind
    leaf_axes  the axis of the rows of each input tensor, as the probe had it
    apart      a row of the probe gave the same by itself as in its batch, see `apart.py`
    writes_inputs  the forward writes to what it is given, and is to be given copies
    unshown    sites that the probe showed nothing: what becomes of their output is not known
    """

    sites: tuple[Site, ...]
    unread: tuple[Unread, ...]
    calls: Mapping[CallKey, Sequence[Sequence[SitePlan]]] = field(default_factory=dict, repr=False)
    uneven: frozenset[CallKey] = field(default=frozenset(), repr=False)
    gains: frozenset[int] = field(default=frozenset(), repr=False)
    leaf_axes: tuple[int | None, ...] = field(default=(), repr=False)
    apart: bool = field(default=False, repr=False)
    writes_inputs: bool = field(default=False, repr=False)
    unshown: frozenset[str] = field(default=frozenset(), repr=False)

    @cached_property
    def weights(self) -> frozenset[str]:
        """The parameters and buffers that the sites are made of."""
        return frozenset[str]().union(*[plan.names for plan in self.plans()])

    @property
    def idle(self) -> int:
        """How many parameters never acted, and sites were shown nothing: another probe might show what they do."""
        return sum(not unread.acts for unread in self.unread) + len(self.unshown)

    def plans(self) -> set[SitePlan]:
        """Every plan, once."""
        return {plan for each in self.calls.values() for call in each for plan in call}
