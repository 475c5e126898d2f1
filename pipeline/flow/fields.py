"""The receptive field of each tensor's positions in the model's input, along each axis that still has one.

Layer 1. A position p sees the inputs p·stride + offset … + size; axes are followed through views as rows are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pipeline.flow.gates import PASSING
from pipeline.flow.operators import BATCH_NORMS, CONVOLUTIONS, DATA_NORMS, DROPOUTS, ELEMENTWISE, JOINS, words
from pipeline.flow.patches import Convolution
from pipeline.flow.record import Graph, Node
from pipeline.flow.row_joins import Source
from pipeline.flow.row_rules import follow
from pipeline.flow.rows import Rows
from pipeline.flow.values import Value

_POOLS = words(
    "max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices "
    "avg_pool1d avg_pool2d avg_pool3d"
)
PADS = words(
    "pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d "
    "replication_pad3d"
)
_SAME = ELEMENTWISE | DATA_NORMS | BATCH_NORMS | DROPOUTS | PASSING


@dataclass(frozen=True)
class Field:
    """What a position sees along one axis of the model's input."""

    size: int = 1
    stride: int = 1
    offset: int = 0

    def through(self, window: int, stride: int, before: int) -> Field:
        """The field behind a window of positions, padded by `before`."""
        return Field(self.size + (window - 1) * self.stride, self.stride * stride, self.offset - before * self.stride)

    def joined(self, other: Field) -> Field | None:
        """The field of a position that sees both; None where their strides differ."""
        if self.stride != other.stride:
            return None
        first = min(self.offset, other.offset)
        return Field(max(self.offset + self.size, other.offset + other.size) - first, self.stride, first)


# axis → field
Axes = dict[int, Field]


@dataclass(eq=False)
class Fields:
    """The fields of every value of a graph, followed on demand in forward order."""

    graph: Graph
    _axes: dict[Value, Axes] = field(default_factory=dict)
    _done: int = 0

    def of(self, value: Value) -> Axes:
        """The axes of a value that have a field."""
        made_by = -1 if value.node is None else value.node[0]
        for node in self.graph.nodes[self._done : made_by + 1]:
            for part, out in enumerate(node.outputs):
                if out.node == (node.index, part):
                    self._axes[out] = self._after(node, part)
        self._done = max(self._done, made_by + 1)
        return self._known(value)

    def _known(self, value: Value) -> Axes:
        if value.node is None and value not in self._axes:
            rows = None if value.rows is None else value.rows.axis
            shape = self.graph.shapes[value]
            self._axes[value] = {axis: Field() for axis in range(len(shape)) if axis != rows}
        return self._axes.get(value, {})

    def _after(self, node: Node, part: int) -> Axes:
        name = node.op.name
        if not node.inputs:
            return {}
        if node.affine is not None and isinstance(node.affine.geometry, Convolution):
            return self._windowed(self._known(node.inputs[0]), node, node.affine.geometry)
        if name in CONVOLUTIONS:
            return {}
        if name in _POOLS:
            return self._pooled(node)
        if name in PADS:
            return self._padded(node)
        if name == "slice":
            return self._sliced(node)
        if node.op.is_view or (node.affine is not None and name == "linear"):
            return self._viewed(node, part)
        if name in _SAME or name in JOINS:
            return self._merged(node)
        return {}

    def _windowed(self, axes: Axes, node: Node, geometry: Convolution) -> Axes:
        dims = len(geometry.kernel)
        first = len(self.graph.shapes[node.outputs[0]]) - dims
        made = {}
        for i in range(dims):
            if first + i in axes:
                window = (geometry.kernel[i] - 1) * geometry.dilation[i] + 1
                made[first + i] = axes[first + i].through(window, geometry.stride[i], geometry.padding[i][0])
        return made

    def _pooled(self, node: Node) -> Axes:
        dims = int(node.op.name.split("pool")[1][0])
        given = dict(zip(node.op.arguments, node.args, strict=False)) | node.kwargs
        kernel = _each(given["kernel_size"], dims)
        stride = _each(given.get("stride") or kernel, dims)
        padding, dilation = _each(given.get("padding", 0), dims), _each(given.get("dilation", 1), dims)
        pads = tuple((pad, pad) for pad in padding)
        return self._windowed(self._known(node.inputs[0]), node, Convolution(kernel, stride, pads, dilation, 1))

    def _padded(self, node: Node) -> Axes:
        given = dict(zip(node.op.arguments, node.args, strict=False)) | node.kwargs
        sizes, dims = given["pad" if "pad" in given else "padding"], len(self.graph.shapes[node.outputs[0]])
        made = dict(self._known(node.inputs[0]))
        for i in range(0, len(sizes), 2):
            axis = dims - 1 - i // 2
            if given.get("mode") == "circular" and any(sizes[i : i + 2]):
                made.pop(axis, None)  # the other end is seen too
            elif axis in made:
                made[axis] = made[axis].through(1, 1, sizes[i])
        return made

    def _sliced(self, node: Node) -> Axes:
        given = dict(zip(node.op.arguments, node.args, strict=False)) | node.kwargs
        made = dict(self._known(node.inputs[0]))
        size = self.graph.shapes[node.inputs[0]]
        axis = given.get("dim", 0) % len(size)
        start, _, step = slice(given.get("start"), None, given.get("step", 1)).indices(size[axis])
        if axis in made:
            made[axis] = made[axis].through(1, step, -start)
        return made

    def _viewed(self, node: Node, part: int) -> Axes:
        source = node.inputs[0]
        old, new = self.graph.shapes[source], self.graph.shapes[node.outputs[part]]
        if node.op.name == "linear":
            return {axis: one for axis, one in self._known(source).items() if axis < len(new) - 1}
        given = dict(zip(node.op.arguments, node.args, strict=False)) | node.kwargs
        made = {}
        for axis, one in self._known(source).items():
            rows = Rows(axis, old[axis])
            tensor: Any = source
            after = follow(node.op.name, given, [Source(rows, old, tensor)], new, part)
            if after is not None and after.axis is not None and after.inner == 1 and new[after.axis] == old[axis]:
                made[after.axis] = one
        return made

    def _merged(self, node: Node) -> Axes:
        shape = self.graph.shapes[node.outputs[0]]
        merged: Axes | None = None
        for value in dict.fromkeys(node.inputs):
            lead = len(shape) - len(self.graph.shapes[value])
            here = {axis + lead: one for axis, one in self._known(value).items()}
            if merged is None:
                merged = here
                continue
            joint = {axis: one.joined(here[axis]) for axis, one in merged.items() if axis in here}
            merged = {axis: one for axis, one in joint.items() if one is not None}
        return merged or {}


def _each(value: Any, dims: int) -> tuple[int, ...]:
    values = [value] if isinstance(value, int) else list(value)
    return tuple(values * dims if len(values) == 1 else values)
