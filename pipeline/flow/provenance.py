"""Whose units the numbers of each tensor are, for every value of a recorded forward.

Layer 1. Each element carries the number of the unit it came from, through what keeps units apart: elementwise maps,
norms, pools, resampling, views, concatenation. Where two units meet (a residual sum, attention) there is none.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from pipeline.flow.operators import BATCH_NORMS, DATA_NORMS, DROPOUTS, ELEMENTWISE, JOINS, words
from pipeline.flow.path import once, placed
from pipeline.flow.record import Graph, Node, fixed_in, rerun
from pipeline.flow.values import Value

NOBODY = -1
_POOLS = words(
    "max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices "
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
    "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d upsample_nearest1d upsample_nearest2d "
    "upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d pad "
    "constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d lp_pool2d"
)
_REDUCTIONS = words("mean sum amax amin max min")
_SAME = ELEMENTWISE | DATA_NORMS | BATCH_NORMS | DROPOUTS | words("to _to_copy contiguous clone detach type_as")


@dataclass(frozen=True)
class Unit:
    """One unit of a site."""

    site: str
    unit: int


@dataclass(eq=False)
class Provenance:
    """The units behind each value of a graph, followed as its sites become known, in forward order."""

    graph: Graph
    units: list[Unit] = field(default_factory=list)
    _shadows: dict[Value, torch.Tensor | None] = field(default_factory=dict)
    _starts: dict[Value, torch.Tensor] = field(default_factory=dict)
    _done: int = 0

    def begin(
        self, value: Value, axes: tuple[int, ...], units: list[Unit | None], where: torch.Tensor | None = None
    ) -> None:
        """Let a value's elements be the units of a site, along its axes; None for a unit that is in no site.

        Only those in `where` if it is given: others have begun, or will begin, as another site's.
        """
        numbers = []
        for unit in units:
            numbers.append(NOBODY if unit is None else len(self.units))
            self.units += [] if unit is None else [unit]
        shape = self.graph.shapes[value]
        sizes = [shape[axis] for axis in axes]
        here = placed(torch.tensor(numbers, dtype=torch.int32).view(sizes), shape, axes)
        if where is not None and not bool(where.all()):
            here = here.where(where, self._starts.get(value, _nobody(shape)))
        self._starts[value] = here

    def of(self, value: Value) -> torch.Tensor | None:
        """The number of the unit behind each element (NOBODY where there is none); None if there is none at all."""
        made_by = -1 if value.node is None else value.node[0]
        for node in self.graph.nodes[self._done : made_by + 1]:
            self._follow(node)
        self._done = max(self._done, made_by + 1)
        return self._shadows.get(value)

    def _follow(self, node: Node) -> None:
        shadows = self._after(node)
        for value, shadow in zip(node.outputs, shadows or [None] * len(node.outputs), strict=True):
            if value in self._starts:
                shadow = self._starts[value]
            if shadow is not None and not bool((once(shadow) >= 0).any()):
                shadow = None
            self._shadows[value] = shadow

    def _after(self, node: Node) -> list[torch.Tensor | None] | None:
        name, known = node.op.name, [self._shadows.get(value) for value in node.inputs]
        if not any(shadow is not None for shadow in known):
            return None
        shapes = [self.graph.shapes[value] for value in node.outputs]
        if node.op.is_view or name in JOINS:
            return self._replayed(node)
        if name in _SAME and all(shape == shapes[0] for shape in map(self.graph.shapes.__getitem__, node.inputs)):
            return [_common(known), *[None] * (len(shapes) - 1)]
        first = known[0]
        if name == "masked_fill" and first is not None and first.shape == shapes[0]:
            return [first]
        if first is None or len(node.inputs) > 1:
            return None
        if name in _POOLS and len(shapes[0]) == first.dim():
            return [_stretched(first, shapes[0]), *[None] * (len(shapes) - 1)]
        if name in _REDUCTIONS:
            return [_reduced(node, first, shapes[0]), *[None] * (len(shapes) - 1)]
        return None

    def _replayed(self, node: Node) -> list[torch.Tensor | None] | None:
        if node.op.is_view and self._shadows.get(node.inputs[0]) is None:
            return None
        given: dict[Value, torch.Tensor] = {}
        for value in node.inputs:
            shadow = self._shadows.get(value)
            given[value] = _nobody(self.graph.shapes[value]) if shadow is None else shadow
        for fixed in fixed_in(node):
            given[fixed.value] = _nobody(fixed.tensor.shape)
        made = rerun(node, given)
        return None if made is None else [shadow.to(torch.int32) for shadow in made]


def _nobody(shape: torch.Size) -> torch.Tensor:
    return torch.full((1,) * len(shape), NOBODY, dtype=torch.int32).expand(shape)


def _common(known: list[torch.Tensor | None]) -> torch.Tensor | None:
    """The units where all operands have the same one."""
    first = known[0]
    if first is None:
        return None
    for other in known[1:]:
        if other is None or (other is not first and not torch.equal(once(first), once(other))):
            return None
    return first


def _stretched(shadow: torch.Tensor, shape: torch.Size) -> torch.Tensor | None:
    """A change of the axes behind the channels: (N, C, …) keeps its channels."""
    if shape[:2] != shadow.shape[:2]:
        return None
    narrow = shadow[(slice(None), slice(None), *[slice(0, 1)] * (shadow.dim() - 2))]
    return narrow.expand(shape) if bool((once(shadow) == once(narrow)).all()) else None


def _reduced(node: Node, shadow: torch.Tensor, shape: torch.Size) -> torch.Tensor | None:
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    axes = [dims] if isinstance(dims, int) else dims
    if not isinstance(axes, list | tuple) or any(not isinstance(axis, int) for axis in axes) or not axes:
        return None
    narrow = shadow
    for axis in axes:
        narrow = narrow.narrow(axis, 0, 1)
    if not bool((once(shadow) == once(narrow)).all()):
        return None
    return narrow.reshape(shape)
