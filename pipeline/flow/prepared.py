"""How one presentation is made of the registers of a running script, in as few steps as may be.

Layer 1. What follows from shapes and strides alone was found once, when the forward was recorded; where that is not
all, the presenter does what it did then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.batch import Batch
from pipeline.flow.affine import Affine
from pipeline.flow.gains import Moments
from pipeline.flow.inputs import Inputs
from pipeline.flow.lazy import Lazy, Normed, Same, Viewed
from pipeline.flow.operators import Operator
from pipeline.flow.patches import Geometry
from pipeline.flow.plan import SitePlan
from pipeline.flow.positions import Places
from pipeline.flow.present import Ending, Met, Presenter, geometry_of
from pipeline.flow.registers import Pattern
from pipeline.flow.rows import Rows
from pipeline.flow.strided import Learned, Strided, strided
from pipeline.flow.values import Call, Value
from pipeline.sites import Presentations


class Stage:
    """One batch as it is shown by a script: its presenter, and what the site before was shown."""

    def __init__(self, batch: Batch) -> None:
        self.presenter = Presenter(batch)
        self.batch = batch
        self.inputs: Inputs | None = None
        self._names: dict[torch.device, dict[str, Any]] = {}

    def names(self, like: torch.Tensor) -> dict[str, Any]:
        """See `Presenter.names`; once for each device."""
        found = self._names.get(like.device)
        if found is None:
            found = self._names[like.device] = self.presenter.names(like)
        return found


@dataclass(frozen=True, eq=False)
class MetAt:
    """A `Met` with registers in place of tensors."""

    plan: SitePlan
    out: int
    x: int
    weight: int
    x_value: Value
    weight_value: Value
    geometry: Geometry
    rows: Rows | None
    places: Places | None

    def filled(self, registers: list[Any]) -> Met:
        """The call itself."""
        x, weight = registers[self.x], registers[self.weight]
        affine = Affine(x, self.x_value, weight, self.weight_value, None, None, self.geometry)
        return Met(self.plan, affine, registers[self.out], self.rows, self.places)


@dataclass(frozen=True, eq=False)
class EndingAt:
    """An `Ending` with registers in place of tensors; of a site whose x is its call's own."""

    z: int
    rows: Rows | None
    activation: int | None

    def filled(self, registers: list[Any]) -> Ending:
        """The ending itself."""
        z = registers[self.z]
        return Ending(z, self.rows, Same(z), None if self.activation is None else registers[self.activation])


@dataclass(frozen=True, eq=False)
class LazyAt:
    """A `Lazy` with registers in place of tensors: of the tensor `number` if it has no function, else a view or a norm.

    A norm's result is made once for all that ask for it: it stands in the register `number` from then on.
    """

    number: int
    op: Operator | None = None
    func: torch._ops.OpOverload | None = None
    args: tuple[Pattern, ...] = ()
    kwargs: Mapping[str, Pattern] | None = None
    source: LazyAt | None = None
    part: int | None = None
    moments: tuple[int, int] | None = None

    @property
    def numbers(self) -> tuple[int, ...]:
        """The registers that it needs."""
        patterns = (*self.args, *(self.kwargs or {}).values())
        inner = () if self.source is None else self.source.numbers
        return (self.number, *inner, *(self.moments or ()), *[number for one in patterns for number in one.numbers])

    def filled(self, registers: list[Any]) -> Lazy:
        """The lazy itself."""
        if self.op is None:
            return Same(registers[self.number])
        if self.source is None:
            if registers[self.number] is None:
                moments = None if self.moments is None else Moments(*[registers[one] for one in self.moments])
                registers[self.number] = Normed(self._call(registers), moments)
            return registers[self.number]  # type: ignore[no-any-return]
        return Viewed(self._call(registers), self.source.filled(registers), self.part)

    def _call(self, registers: list[Any]) -> Call:
        assert self.op is not None
        assert self.func is not None
        args = [one.filled(registers) for one in self.args]
        kwargs = {name: one.filled(registers) for name, one in (self.kwargs or {}).items()}
        return Call(self.op, self.func, args, kwargs, [], [])


@dataclass(frozen=True, eq=False)
class Views:
    """z, a and w·x + b as views of registers, and all that is the same in every batch.

    activation  a is a view of that register; None: it is the gate's of z
    """

    z: tuple[int, Strided]
    activation: tuple[int, Strided] | None
    affine: Strided | None
    enter: Learned
    row_L: torch.Tensor | None
    position_LS: torch.Tensor | None
    padded_S: torch.Tensor | None
    has_windows: bool
    has_mask: bool
    has_labels: bool


@dataclass(frozen=True, eq=False)
class Prepared:
    """One presentation; `shares` the inputs of the one before."""

    call: MetAt
    ending: EndingAt | None
    up: MetAt | None
    before_gain: LazyAt | None
    shares: bool
    views: Views | None

    @property
    def numbers(self) -> set[int]:
        """The registers that it needs."""
        if self.views is not None:
            return self._numbers_of_views(self.views)
        calls = [one for one in (self.call, self.up) if one is not None]
        found = {number for one in calls for number in (one.out, one.x, one.weight)}
        if self.ending is not None:
            found.add(self.ending.z)
            if self.ending.activation is not None:
                found.add(self.ending.activation)
        return found | set(() if self.before_gain is None else self.before_gain.numbers)

    def _numbers_of_views(self, views: Views) -> set[int]:
        # an output that only leads to z makes room for what comes next
        found = {views.z[0]} | ({self.call.x} if self.before_gain is None else set(self.before_gain.numbers))
        if views.activation is not None:
            found.add(views.activation[0])
        if views.affine is not None:
            found.add(self.call.out)
        return found

    def present(self, registers: list[Any], stage: Stage) -> Presentations:
        """The presentation of the batch on stage."""
        if self.views is not None:
            return self._viewed(registers, stage, self.views)
        stage.inputs = None
        return stage.presenter.affine(
            self.call.filled(registers),
            ending=None if self.ending is None else self.ending.filled(registers),
            before_gain=None if self.before_gain is None else self.before_gain.filled(registers),
            up=None if self.up is None else self.up.filled(registers),
        )

    def _viewed(self, registers: list[Any], stage: Stage, views: Views) -> Presentations:
        plan = self.call.plan
        number, view = views.z
        z_LSU = a_LSU = view.of(registers[number])
        if views.activation is not None:
            a_LSU = views.activation[1].of(registers[views.activation[0]])
        elif plan.gate is not None:
            a_LSU = plan.gate.apply(z_LSU)
        inputs = self._inputs(registers, stage, views)
        return Presentations(
            site=plan.site,
            z_LSU=z_LSU,
            a_LSU=a_LSU,
            **stage.names(z_LSU),
            patches=inputs.patches,
            patches_at=inputs.patches_at,
            windows=inputs.windows if views.has_windows else None,
            input_sums=inputs.sums,
            affine_LSU=None if views.affine is None else views.affine.of(registers[self.call.out]),
            row_L=views.row_L,
            position_LS=views.position_LS,
            mask_LS=stage.batch.mask_NS if views.has_mask else None,
            label_LS=stage.batch.label_NS if views.has_labels else None,
            padded_S=views.padded_S,
        )

    def _inputs(self, registers: list[Any], stage: Stage, views: Views) -> Inputs:
        if self.shares and stage.inputs is not None:
            return stage.inputs
        call = self.call
        assert call.x_value.rows is not None
        stage.inputs = Inputs(
            geometry_of(call.plan, call.geometry),
            Same(registers[call.x]) if self.before_gain is None else self.before_gain.filled(registers),
            call.x_value.rows,
            groups=call.plan.group_part,
            enter=views.enter,
        )
        return stage.inputs


def views_of(
    presentations: Presentations,
    call: MetAt,
    ending: EndingAt | None,
    sources: Mapping[int, torch.Tensor],
    batch: Batch,
) -> Views | None:
    """How a presentation that was made is had as views of `sources`, by register; None where it cannot."""
    plan, activation = call.plan, None if ending is None else ending.activation
    if plan.squares or (plan.branch is not None and activation is None) or not _as_in(batch, presentations):
        return None
    number = call.out if ending is None else ending.z
    wanted = {"z": (presentations.z_LSU, number)}
    if activation is not None:
        wanted["a"] = (presentations.a_LSU, activation)
    if plan.before is not None:
        assert presentations.affine_LSU is not None
        wanted["affine"] = (presentations.affine_LSU, call.out)
    made = {name: strided(tensor, sources[register]) for name, (tensor, register) in wanted.items()}
    found = {name: view for name, view in made.items() if view is not None}
    if len(found) < len(wanted):
        return None
    geometry, rows = geometry_of(plan, call.geometry), call.x_value.rows
    assert rows is not None
    return Views(
        z=(number, found["z"]),
        activation=None if activation is None else (activation, found["a"]),
        affine=found.get("affine"),
        enter=Learned(lambda x: geometry.enter(x, rows)),
        row_L=presentations.row_L,
        position_LS=presentations.position_LS,
        padded_S=presentations.padded_S,
        has_windows=presentations.windows is not None,
        has_mask=presentations.mask_LS is not None,
        has_labels=presentations.label_LS is not None,
    )


def _as_in(batch: Batch, presentations: Presentations) -> bool:
    """Whether mask and labels of the presentations, where there are any, are the batch's own."""
    mask_LS, label_LS = presentations.mask_LS, presentations.label_LS
    return (mask_LS is None or mask_LS is batch.mask_NS) and (label_LS is None or label_LS is batch.label_NS)
