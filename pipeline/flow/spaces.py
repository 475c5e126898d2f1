"""What the inputs of a site mean: whose units they are, which embeddings, and what of the model's input they see.

Layer 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeline.flow.affine import Affine
from pipeline.flow.bags import Bags
from pipeline.flow.fields import Fields
from pipeline.flow.naming import owner_path
from pipeline.flow.patches import Contraction, Convolution, Geometry
from pipeline.flow.plan import SitePlan
from pipeline.flow.provenance import NOBODY, Provenance, Unit
from pipeline.flow.record import Graph, Node
from pipeline.flow.rows import Rows
from pipeline.flow.transposed import Phase
from pipeline.flow.values import Value
from pipeline.sites import InputSpace


@dataclass(eq=False)
class Spaces:
    """Reads input spaces off a recorded graph, as its sites become known in forward order."""

    graph: Graph

    def __post_init__(self) -> None:
        self._provenance = Provenance(self.graph)
        self._fields = Fields(self.graph)

    def of(self, affine: Affine, geometry: Geometry) -> InputSpace:
        """The space of the inputs that one call's units share."""
        shape = geometry.pattern_shape(affine.weight)
        if isinstance(geometry, Bags):
            return InputSpace("values", shape, upstream=(owner_path(sorted(affine.weight_value.names)[0]),))
        sites, units = self._upstream(affine.x_value, geometry)
        field = self._field(affine.x_value, geometry)
        if not isinstance(geometry, Contraction):
            kind = "lags" if len(shape) == 2 else "pixels"
            return InputSpace(kind, shape, upstream=sites, upstream_unit=units, field=field)
        if units:
            return InputSpace("units", shape, upstream=sites, upstream_unit=units)
        return self._embeddings(affine, shape) or self._leaf(affine, shape) or InputSpace("features", shape)

    def know(
        self,
        node: Node,
        plans: Sequence[SitePlan],
        *,
        output: Value | None = None,
        where: torch.Tensor | None = None,
    ) -> None:
        """Let the units of a call's sites be known to what comes after; of a gated pair, at the product.

        `where` tells them in the output from those of other calls beside them.
        """
        affine = node.affine
        if affine is None or not plans or (isinstance(affine.geometry, Phase) and len(plans) > 1):
            return
        value = node.outputs[0] if output is None else output
        total = affine.geometry.matrix_UD(affine.weight).shape[0]
        units: list[Unit | None] = [None] * total
        for plan in plans:
            chosen = range(total) if plan.part is None else plan.part.tolist()
            for index, unit in enumerate(chosen):
                units[unit] = Unit(plan.site.name, index)
        if output is not None:
            units = [Unit(plans[0].site.name, unit) for unit in range(plans[0].site.units)]
        self._provenance.begin(value, affine.geometry.unit_axes, units, where)

    def _upstream(self, x: Value, geometry: Geometry) -> tuple[tuple[str, ...], tuple[tuple[int, int], ...]]:
        shadow = self._provenance.of(x)
        numbers = None if shadow is None else _along_inputs(shadow, x.rows, geometry)
        if numbers is None or bool((numbers == NOBODY).any()):
            return (), ()
        units = [self._provenance.units[number] for number in numbers.tolist()]
        sites = tuple(dict.fromkeys(unit.site for unit in units))
        place = {site: index for index, site in enumerate(sites)}
        return sites, tuple((place[unit.site], unit.unit) for unit in units)

    def _field(self, x: Value, geometry: Geometry) -> tuple[tuple[int, int, int], ...]:
        if not isinstance(geometry, Convolution):
            return ()
        axes = self._fields.of(x)
        first = len(self.graph.shapes[x]) - len(geometry.kernel)
        made = []
        for i, kernel in enumerate(geometry.kernel):
            if first + i not in axes:
                return ()
            window = (kernel - 1) * geometry.dilation[i] + 1
            seen = axes[first + i].through(window, geometry.stride[i], geometry.padding[i][0])
            made.append((seen.size, seen.stride, seen.offset))
        return tuple(made)

    def _embeddings(self, affine: Affine, shape: tuple[int, ...]) -> InputSpace | None:
        """The fields of concatenated embeddings and the factors of each, or the one embedding of a token."""
        lookup = affine.x_value.lookup
        if not lookup:
            return None
        tables = tuple(owner_path(sorted(block.names)[0]) for block in lookup)
        width = lookup[0].table.shape[1]
        total = math.prod(shape)
        if total == width:
            return InputSpace("embedding", shape, upstream=tables)
        return InputSpace("embeddings", (total // width, width) if total % width == 0 else shape, upstream=tables)

    def _leaf(self, affine: Affine, shape: tuple[int, ...]) -> InputSpace | None:
        """The model's own input, seen flat: its shape again."""
        node, value = self.graph.producer(affine.x_value), affine.x_value
        while node is not None and node.op.name in ("view", "reshape", "flatten") and len(node.inputs) == 1:
            value = node.inputs[0]
            node = self.graph.producer(value)
        whole = tuple(self.graph.shapes[value][1:])
        if node is not None or value.rows is None or value.rows.axis != 0 or math.prod(whole) != math.prod(shape):
            return None
        kind = {1: "features", 2: "lags"}.get(len(whole), "pixels")
        return InputSpace(kind, whole)


def _along_inputs(shadow: torch.Tensor, rows: Rows | None, geometry: Geometry) -> torch.Tensor | None:
    """One number per input channel of a convolution or input of a dense call; None if positions differ."""
    if rows is None:
        return None
    if isinstance(geometry, Contraction):
        entries = geometry.enter(shadow, rows)
        return entries[0, 0, 0] if geometry.groups == 1 and bool((entries == entries[:1, :1]).all()) else None
    entries = geometry.enter(shadow, rows)
    channels = entries[:1].flatten(2)[:, :, :1]
    return channels[0, :, 0] if bool((entries.flatten(2) == channels).all()) else None
