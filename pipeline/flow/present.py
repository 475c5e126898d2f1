"""Makes presentations of a site out of one call that was met.

Layer 1: pure torch. Everything is a view of what the model computed, or lazy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from pipeline.batch import Batch
from pipeline.errors import ModelError
from pipeline.flow.affine import Affine
from pipeline.flow.cells import Presented
from pipeline.flow.inputs import Inputs
from pipeline.flow.layout import Arranged, arrange
from pipeline.flow.lazy import Lazy
from pipeline.flow.machines import present_machine, squares_of
from pipeline.flow.patches import Geometry, dense
from pipeline.flow.plan import SitePlan
from pipeline.flow.positions import Places, number_of_each, positions_of
from pipeline.flow.rows import Rows
from pipeline.flow.transposed import Phase
from pipeline.flow.values import Call, Value
from pipeline.sites import Presentations


@dataclass(frozen=True, eq=False)
class Met:
    """An affine call that was met: its output as it stood, and the rows and places of that."""

    plan: SitePlan
    affine: Affine
    out: torch.Tensor
    rows: Rows | None
    places: Places | None


@dataclass(frozen=True, eq=False)
class Ending:
    """Where a trail ends: z as the model has it, its rows, what the trail made of the call's input, and a if known."""

    z: torch.Tensor
    rows: Rows | None
    x: Lazy
    activation: torch.Tensor | None = None


class Presenter:
    """Presents the calls of one batch."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self._last: tuple[Value, frozenset[int], Inputs] | None = None

    def affine(
        self, call: Met, *, ending: Ending | None = None, before_gain: Lazy | None = None, up: Met | None = None
    ) -> Presentations:
        """What an affine call shows its site, with the trail's ending, the norm before it, its pair's other branch."""
        plan, affine = call.plan, call.affine
        geometry = geometry_of(plan, affine.geometry)
        own = geometry.leave(call.out, _known(call.rows, plan))
        at = self._positions(own, geometry, call.out.shape, call.rows, call.places)
        z_LSU = _of_part(
            own.tensor if ending is None else _leave(plan, geometry, ending.z, ending.rows, like=own), plan
        )
        z_LSU = z_LSU if plan.scaling is None else plan.scaling.apply(z_LSU)
        if ending is not None and ending.activation is not None:
            a_LSU = _leave(plan, geometry, ending.activation, ending.rows, like=own)
        else:
            a_LSU = _activation(plan, z_LSU, own, up)
        inputs = self._shared(plan, affine, _inputs(plan, affine, geometry, ending, before_gain))
        if plan.squares:
            a_LSU = 0.5 * (z_LSU.square() - squares_of(plan.site, inputs.patches(0, len(z_LSU))))
        return Presentations(
            site=plan.site,
            z_LSU=z_LSU,
            a_LSU=a_LSU,
            **self.names(z_LSU),
            patches=inputs.patches,
            patches_at=inputs.patches_at,
            windows=inputs.windows if inputs.has_windows(plan.site.fan_in) else None,
            input_sums=inputs.sums,
            affine_LSU=None if plan.before is None else plan.before.apply(_of_part(own.tensor, plan)),
            row_L=own.row_L,
            position_LS=own.position_LS,
            mask_LS=self._mask(own, at, lost=call.places is None and affine.x_value.places is None),
            label_LS=self._labels(own, at),
            padded_S=inputs.padded(),
        )

    def _shared(self, plan: SitePlan, affine: Affine, inputs: Inputs) -> Inputs:
        """The inputs of the site before if they are the same (queries, keys and values): their sums are there already.

        Only of the last site, so that no more than one input is kept alive.
        """
        last = self._last
        if last is not None and last[:2] == (affine.x_value, plan.gain) and last[2].are(inputs):
            return last[2]
        self._last = None if plan.lifts else (affine.x_value, plan.gain, inputs)
        return inputs

    def cell(self, shown: Presented, rows: Rows | None, places: Places | None) -> Presentations:
        """What a replayed recurrent call, of whose input the rows and places are, shows one of its gates."""
        geometry, known = dense(shown.z.dim()), _known(rows, shown.plan)
        z = geometry.leave(shown.z, known)
        at = self._positions(z, geometry, shown.z.shape, known, places)
        inputs = Inputs(geometry, lambda: shown.x, known)
        gate = shown.plan.gate
        return Presentations(
            site=shown.plan.site,
            z_LSU=z.tensor,
            a_LSU=z.tensor if gate is None else gate.apply(z.tensor),
            patches=inputs.patches,
            patches_at=inputs.patches_at,
            input_sums=inputs.sums,
            row_L=z.row_L,
            position_LS=z.position_LS,
            mask_LS=self._mask(z, at, lost=places is None),
            label_LS=self._labels(z, at),
            **self.names(shown.z),
        )

    def machine(self, plan: SitePlan, call: Call, out: torch.Tensor) -> Presentations:
        """What a factorisation machine's rows are shown."""
        return present_machine(plan, call, out, **self.names(out))

    def names(self, like: torch.Tensor) -> dict[str, Any]:
        """The uid and class of each row, where a tensor is."""
        label_N = self.batch.label_N
        return {
            "uid_N": self.batch.uid_N.to(like.device),
            "label_N": None if label_N is None else label_N.to(like.device),
        }

    def _positions(
        self, own: Arranged, geometry: Geometry, shape: torch.Size, rows: Rows | None, places: Places | None
    ) -> torch.Tensor | None:
        """Which position of its row each presentation is, (L, S); None unless they are all that have a label or mask.

        `shape` is that of the call's output, of which `rows` and `places` are.
        """
        entries, positions = own.tensor.shape[:2]
        named = positions_of(self.batch)
        if named == 0 or rows is None or entries * positions != self.batch.rows * named:
            return None
        if named == 1:
            return torch.zeros((entries, positions), dtype=torch.int64)
        unit_axes = {axis % len(shape) for axis in geometry.unit_axes}
        if places is None or any(one.axis is None or one.axis in unit_axes for one in places):
            return None
        number = number_of_each(places, shape)
        one_unit = [1 if axis in unit_axes else size for axis, size in enumerate(shape)]
        at_LS = geometry.leave(number.expand(one_unit), rows).tensor[..., 0]
        row_L = torch.arange(entries) if own.row_L is None else own.row_L.cpu()
        of_row = at_LS[row_L == 0].flatten().sort().values
        return at_LS if torch.equal(of_row, torch.arange(named)) else None

    def _mask(self, own: Arranged, at_LS: torch.Tensor | None, *, lost: bool) -> torch.Tensor | None:
        """The batch's mask where the site's positions are those of the mask.

        Where what counts them was lost on the way, as far as their number tells: padding is then the worse mistake.
        """
        mask_NS = self.batch.mask_NS
        if mask_NS is None:
            return None
        mask_NS = mask_NS.to(own.tensor.device)
        if at_LS is not None or not lost:
            return None if at_LS is None else _at(mask_NS, own, at_LS)
        entries, positions = own.tensor.shape[:2]
        if own.row_L is None or own.position_LS is None:
            return mask_NS if positions == mask_NS.shape[1] else None
        if entries * positions != mask_NS.numel() or int(own.position_LS.max()) >= mask_NS.shape[1]:
            return None
        return mask_NS[own.row_L[:, None], own.position_LS]

    def _labels(self, own: Arranged, at_LS: torch.Tensor | None) -> torch.Tensor | None:
        """The class of each presentation where the site's positions are those that have labels."""
        label_NS = self.batch.label_NS
        return None if label_NS is None or at_LS is None else _at(label_NS.to(own.tensor.device), own, at_LS)

    def masks_others(self, presentations: Presentations) -> bool:
        """Whether the batch has a mask of positions, and the site others: neither those nor just the real ones."""
        mask_NS = self.batch.mask_NS
        several = presentations.entries * presentations.positions > presentations.rows
        if mask_NS is None or presentations.mask_LS is not None or not several:
            return False
        count_N = torch.bincount(presentations.row_index_L, minlength=presentations.rows) * presentations.positions
        return not torch.equal(count_N.cpu(), mask_NS.sum(1).cpu())

    def labels_others(self, presentations: Presentations) -> bool:
        """Whether the batch has a label for each position, and the site not one presentation for each."""
        return self.batch.label_NS is not None and presentations.label_LS is None

    def check(self, presentations: Presentations) -> None:
        """Raise ModelError unless every row is there, and every unit."""
        site, z_LSU = presentations.site, presentations.z_LSU
        expected = self.batch.rows if presentations.row_L is None else len(presentations.row_L)
        if z_LSU.shape[0] != expected or z_LSU.shape[2] != site.units:
            raise ModelError(
                f"site {site.name}: presented {z_LSU.shape[0]} entries of {z_LSU.shape[2]} units; "
                f"expected {expected} of {site.units}"
            )


def _at(value_NS: torch.Tensor, own: Arranged, at_LS: torch.Tensor) -> torch.Tensor:
    """The value of the row and position that each presentation is; as it is, uncopied, where they stand in order."""
    if own.row_L is None and torch.equal(at_LS, torch.arange(at_LS.shape[1]).expand_as(at_LS)):
        return value_NS
    row_L = torch.arange(len(at_LS)) if own.row_L is None else own.row_L
    return value_NS[row_L.to(value_NS.device)[:, None], at_LS.to(value_NS.device)]


def _activation(plan: SitePlan, z_LSU: torch.Tensor, own: Arranged, up: Met | None) -> torch.Tensor:
    a_LSU = z_LSU if plan.gate is None else plan.gate.apply(z_LSU)
    if plan.branch is None:
        return a_LSU
    other = own if up is None else up.affine.geometry.leave(up.out, _known(up.rows, plan))
    up_LSU = other.tensor if plan.branch.part is None else choose_units(other.tensor, plan.branch.part)
    return a_LSU * (up_LSU if plan.branch.scaling is None else plan.branch.scaling.apply(up_LSU))


def _inputs(
    plan: SitePlan, affine: Affine, geometry: Geometry, ending: Ending | None, before_gain: Lazy | None
) -> Inputs:
    source: Lazy = lambda: affine.x  # noqa: E731
    rows = affine.x_value.rows
    if plan.lifts and ending is not None:
        source, rows, geometry = ending.x, ending.rows, dense(ending.z.dim())
    elif plan.gain:
        if before_gain is None:
            raise ModelError(f"site {plan.site.name}: its input does not come from its norm in this batch")
        source = before_gain
    known = _known(rows, plan)
    if not geometry.carries(known):
        raise ModelError(f"site {plan.site.name}: it sums over the rows of the batch, or each row has its own weights")
    return Inputs(geometry, source, known, groups=plan.group_part)


def _known(rows: Rows | None, plan: SitePlan) -> Rows:
    if rows is None:
        raise ModelError(
            f"site {plan.site.name}: which rows of the batch its presentations belong to cannot be followed"
        )
    return rows


def geometry_of(plan: SitePlan, geometry: Geometry) -> Geometry:
    """The geometry of a call as its plan reads it: of a transposed convolution one phase of it."""
    if plan.phase is not None and isinstance(geometry, Phase):
        return replace(geometry, phase=plan.phase)
    return geometry


def _leave(plan: SitePlan, geometry: Geometry, z: torch.Tensor, rows: Rows | None, *, like: Arranged) -> torch.Tensor:
    """z where its trail ends, with the entries and positions that the call itself has, in their order."""
    if plan.phase is not None:
        return geometry.leave(z, _known(rows, plan)).tensor
    entries, positions = like.tensor.shape[:2]
    for split in (False, True):
        tensor = arrange(z, _known(rows, plan), (plan.unit_axis,), split=split).tensor
        if tensor.shape[:2] == (entries, positions):
            return tensor
    return tensor.reshape(entries, positions, -1)


def _of_part(tensor_LSU: torch.Tensor, plan: SitePlan) -> torch.Tensor:
    return tensor_LSU if plan.part is None else choose_units(tensor_LSU, plan.part)


def choose_units(tensor_LSU: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """Some units of the last axis: a view where they are a run."""
    first, count = int(units[0]), len(units)
    if int(units[-1]) == first + count - 1 and bool((units.diff() == 1).all()):
        return tensor_LSU[..., first : first + count]
    return tensor_LSU[..., units.to(tensor_LSU.device)]
