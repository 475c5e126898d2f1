"""Follows a site's output through the recorded graph to its fold and its gate.

Layer 1. Every element of the output carries the number of its unit along, in a shadow tensor that the model's own
views, concatenations and pools are applied to: what arrives says exactly which unit is where.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from pipeline.flow.aggregate import gathers, mixes, spread_shadow
from pipeline.flow.gates import CHANNEL_MAPS, PASSING, Gate, find_gate
from pipeline.flow.numbers import SCALAR_MAPS, ScalarMap, scalar_map
from pipeline.flow.operators import BATCH_NORMS, DATA_NORMS, POOLS, words
from pipeline.flow.record import Graph, Node, fixed_in, fixed_names, rerun
from pipeline.flow.values import Origin, Value

ABSENT = -1
JOINS = words("cat concat concatenate stack")


@dataclass(frozen=True, eq=False)
class Path:
    """How far a site's output has been followed.

    scale_U, shift_U   what is folded so far: z = affine · scale + shift (float64)
    trail              the operations that the model's own z has passed; None once z stands nowhere in the model
    unit_axis          the axis of the units where the trail ends, from the end
    lifts              how many operations of the trail sum over neighbours
    folded             the paths of the norms and scales folded
    fixed              the parameters and buffers of what is folded
    norm               the data-dependent norm that the trail ends in
    over_batch         it takes its mean and variance from the batch
    pooled, gathered, scaled   a max-pool; a choice or weighting of neighbours; a fold has been passed
    turned             how many units have a negative gain behind a max-pool, which thereby keeps their smallest z
    end                the operation that ends the path, "" if its gate does
    taken              the units that were the first to be taken from among all of them: a projection of several
    """

    value: Value
    shadow: torch.Tensor
    scale_U: torch.Tensor
    shift_U: torch.Tensor
    unit_axis: int
    trail: tuple[Node, ...] | None = ()
    lifts: int = 0
    folded: tuple[str, ...] = ()
    fixed: frozenset[str] = frozenset()
    norm: str | None = None
    over_batch: bool = False
    pooled: bool = False
    gathered: bool = False
    scaled: bool = False
    turned: int = 0
    gate: Gate | None = None
    end: str = ""
    last: Node | None = None
    taken: tuple[int, ...] = ()

    @property
    def units(self) -> torch.Tensor:
        """Which units are present, int64, ascending."""
        present = torch.unique(once(self.shadow))
        return present[present >= 0].long()

    def ended(self, reason: str) -> Path:
        """The path as it ends here."""
        return replace(self, end=reason)


def follow(graph: Graph, value: Value, *, units: int, unit_axes: tuple[int, ...], biased: bool) -> list[Path]:
    """Every end of a site's output: one `Path` per reader that its numbers reach, in forward order.

    A gate that all units reach ends the search. `biased`: a bias has been added already, so that what sums over
    neighbours from here on is no affine map of their sum.
    """
    shape = graph.shapes[value]
    numbers = torch.arange(units, dtype=torch.int32).view([shape[axis] for axis in unit_axes])
    shadow = placed(numbers, shape, unit_axes)
    ones, zeros = torch.ones(units, dtype=torch.float64), torch.zeros(units, dtype=torch.float64)
    start = Path(
        value, shadow, ones, zeros, unit_axes[-1] if unit_axes else -1, trail=() if len(unit_axes) == 1 else None
    )
    return _ends(graph, start, biased)


def plain_of(path: Path) -> Path:
    """The path as if nothing had been passed and no gate found."""
    ones = torch.ones_like(path.scale_U)
    start = Path(path.value, path.shadow, ones, torch.zeros_like(ones), path.unit_axis)
    return start.ended("followed no further")


def placed(numbers: torch.Tensor, shape: torch.Size, axes: tuple[int, ...]) -> torch.Tensor:
    """Lay the numbers of units out along their axes, the same everywhere else."""
    order = sorted(range(len(axes)), key=lambda i: axes[i])
    laid = numbers.permute(order)
    if not axes:
        return torch.zeros(1, dtype=torch.int32).expand(shape)
    sizes = [1] * len(shape)
    for axis in axes:
        sizes[axis] = shape[axis]
    return laid.reshape(sizes).expand(shape)


def _ends(graph: Graph, path: Path, biased: bool) -> list[Path]:
    gate = find_gate(graph, path.value, lambda value, fixed: _fixed_number(graph, path, value, fixed))
    if gate is not None and len(path.units) == len(path.scale_U):
        return [replace(path, gate=gate)]
    ends = [replace(path, gate=gate)] if gate is not None else []
    inside = set(gate.nodes) if gate is not None else set()
    readers = [node for node in graph.consumers(path.value) if node not in inside]
    for node in readers:
        for taken in _step(graph, replace(path, last=node), node, biased):
            ends += [taken] if taken.end else _ends(graph, taken, biased)
            if ends and ends[-1].gate is not None and len(ends[-1].units) == len(path.scale_U):
                return ends
    return ends or [path.ended("output")]


def _fixed_number(graph: Graph, path: Path, value: Value, fixed: torch.Tensor) -> torch.Tensor | None:
    if len(graph.shapes[value]) != path.shadow.dim():
        return None
    numbers = _per_unit(path, fixed.detach().cpu(), fixed.dtype)
    return None if numbers is None else numbers.to(fixed.device)


def _per_unit(path: Path, fixed: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor | None:
    """A fixed operand of an elementwise operation as one number per unit; None where it differs within one."""
    shadow = once(path.shadow, fixed.shape)
    try:
        spread = fixed.to(dtype).expand(shadow.shape)
    except RuntimeError:
        return None
    index = shadow.reshape(-1).long()
    kept = index >= 0
    index, numbers = index[kept], spread.reshape(-1)[kept]
    start = torch.zeros(len(path.scale_U), dtype=dtype)
    low = start.scatter_reduce(0, index, numbers, "amin", include_self=False)
    high = start.scatter_reduce(0, index, numbers, "amax", include_self=False)
    return low if torch.equal(low, high) else None


def once(shadow: torch.Tensor, other: torch.Size | None = None) -> torch.Tensor:
    """The shadow without its repetitions, except along axes where `other`, broadcast against it, is longer than 1."""
    sizes = (1,) * (shadow.dim() - len(other)) + tuple(other) if other is not None else (1,) * shadow.dim()
    for axis, (step, size) in enumerate(zip(shadow.stride(), sizes, strict=False)):
        if step == 0 and size == 1:
            shadow = shadow.narrow(axis, 0, min(1, shadow.shape[axis]))
    return shadow


def _step(graph: Graph, path: Path, node: Node, biased: bool) -> list[Path]:
    name = node.op.name
    if node.op.is_view and path.value is not node.args[0]:
        return []  # only its shape or type is read
    if name in PASSING:
        return [replace(path, value=node.outputs[0])]
    if node.op.is_view:
        return [_cropped(graph, path, moved) for moved in _moved(graph, path, node)]
    if name in JOINS or (name in POOLS and len(node.inputs) == 1):
        if path.norm is not None or path.gathered:
            return [path.ended(name)]
        return _moved(graph, replace(path, trail=None, pooled=path.pooled or name in POOLS), node)[:1]
    if name in BATCH_NORMS:
        return [_batch_norm(path, node)]
    if name in SCALAR_MAPS and len(node.inputs) == 1 and (number := scalar_map(node)) is not None:
        return _scaled(graph, path, node, number, biased)
    if name in CHANNEL_MAPS and len(node.inputs) == 1 and fixed_in(node):
        return [_channel_map(graph, path, node)]
    if name in DATA_NORMS and node.inputs[0] is path.value:
        return [_normed(path, node)]
    if gathers(graph, node, path.value) or mixes(node, path.value):
        return [_aggregated(graph, path, node, biased)]
    return [path.ended(name)]


def _cropped(graph: Graph, path: Path, moved: Path) -> Path:
    """A view that leaves positions out: what is met behind it is no longer every z of the site.

    With other readers (a loop over time, a class token) what becomes of one position says nothing of the others.
    """
    if moved.end or moved.shadow.numel() * len(path.units) >= path.shadow.numel() * len(moved.units):
        return moved
    if moved.norm is not None or moved.gathered or len(graph.consumers(path.value)) > 1:
        return moved.ended(moved.last.op.name if moved.last is not None else "")
    return replace(moved, trail=None)


def _moved(graph: Graph, path: Path, node: Node) -> list[Path]:
    given: dict[Value, torch.Tensor] = {
        value: torch.full(graph.shapes[value], ABSENT, dtype=torch.int32) for value in node.inputs
    }
    for arg in fixed_in(node):
        given[arg.value] = torch.full(arg.tensor.shape, ABSENT, dtype=torch.int32)
    given[path.value] = path.shadow
    numbers = {value: tensor.double() for value, tensor in given.items()} if node.op.name in POOLS else given
    out = rerun(node, numbers)
    if out is None:
        return [path.ended(node.op.name)]
    moved = []
    for value, shadow in zip(node.outputs, out, strict=True):
        shadow = shadow.to(torch.int32)
        if bool((shadow >= 0).any()):
            after = replace(path, value=value, shadow=shadow)
            first = not path.taken and len(after.units) < len(path.scale_U)
            moved.append(replace(after, taken=tuple(after.units.tolist())) if first else after)
    return moved


def _batch_norm(path: Path, node: Node) -> Path:
    given = dict(zip(node.op.arguments, node.args, strict=False))
    weight, bias, mean = given["weight"], given["bias"], given["running_mean"]
    if given.get("training", False) or mean is None:
        return replace(_normed(path, node), over_batch=True)
    var_C = given["running_var"].tensor.double().cpu()
    scale_C = (var_C + given["eps"]).rsqrt() * (1 if weight is None else weight.tensor.detach().double().cpu())
    shift_C = (0 if bias is None else bias.tensor.detach().double().cpu()) - mean.tensor.double().cpu() * scale_C
    trailing = [1] * (path.shadow.dim() - 2)
    return _folded(path, node, scale_C.view(-1, *trailing), shift_C.view(-1, *trailing), names_it=True)


def _scaled(graph: Graph, path: Path, node: Node, number: ScalarMap, biased: bool) -> list[Path]:
    """A number that multiplies or is added: part of the pattern where a gate comes behind it, else nothing."""
    scale, shift = torch.tensor(number.scale).double(), torch.tensor(number.shift).double()
    taken = _folded(path, node, scale, shift)
    gated = [] if taken.end else [end for end in _ends(graph, taken, biased) if end.gate is not None]
    return gated or [path.ended(node.op.name)]


def _channel_map(graph: Graph, path: Path, node: Node) -> Path:
    name, fixed = node.op.name, fixed_in(node)
    same_shape = graph.shapes[node.outputs[0]] == path.shadow.shape
    if len(fixed) != 1 or fixed[0].value.origin is not Origin.PARAMETER or not same_shape or "alpha" in node.kwargs:
        return path.ended(name)
    number = fixed[0].tensor.detach().double().cpu()
    one, zero = torch.ones_like(number), torch.zeros_like(number)
    first = node.args[0] is path.value
    if name == "add":
        return _folded(path, node, one, number)
    if name == "sub":
        return _folded(path, node, one if first else -one, -number if first else number, names_it=not first)
    if name == "mul":
        return _folded(path, node, number, zero, names_it=True)
    return _folded(path, node, one / number, zero, names_it=True) if first else path.ended(name)


def _folded(path: Path, node: Node, scale: torch.Tensor, shift: torch.Tensor, *, names_it: bool = False) -> Path:
    scale_U, shift_U = _per_unit(path, scale), _per_unit(path, shift)
    if path.norm is not None or scale_U is None or shift_U is None or (path.gathered and not path.lifts):
        return path.ended(node.op.name)
    turned = int((scale_U[path.units] < 0).sum()) if path.pooled else 0
    axis = unit_axis(path.shadow, len(path.scale_U))
    if path.lifts and axis is None:
        return path.ended(node.op.name)
    names = fixed_names([node])
    return replace(
        path,
        value=node.outputs[0],
        scale_U=path.scale_U * scale_U,
        shift_U=path.shift_U * scale_U + shift_U,
        folded=(*path.folded, owner_of(node, names)) if names_it else path.folded,
        fixed=path.fixed | names,
        trail=None if path.trail is None or axis is None else (*path.trail, node),
        unit_axis=path.unit_axis if axis is None else axis,
        scaled=True,
        turned=path.turned + turned,
    )


def owner_of(node: Node, names: frozenset[str]) -> str:
    """The path of the module that an operation belongs to: its parameters' owner, else the module that runs it."""
    owners = sorted({name.rpartition(".")[0] or name for name in names})
    return node.module if not owners or node.module in owners else owners[0]


def _normed(path: Path, node: Node) -> Path:
    axis = unit_axis(path.shadow, len(path.scale_U))
    if path.trail is None or path.norm is not None or path.gathered or axis is None:
        return path.ended(node.op.name)
    names = fixed_names([node])
    return replace(
        path,
        value=node.outputs[0],
        norm=owner_of(node, names) or node.op.name,
        fixed=path.fixed | names,
        trail=(*path.trail, node),
        unit_axis=axis,
    )


def _aggregated(graph: Graph, path: Path, node: Node, biased: bool) -> Path:
    spread = spread_shadow(node, path.value, path.shadow, graph.shapes[node.outputs[0]])
    if path.trail is None or biased or path.scaled or path.norm is not None or spread is None:
        return path.ended(node.op.name)
    return replace(
        path,
        value=node.outputs[0],
        shadow=spread,
        trail=(*path.trail, node),
        unit_axis=-1,
        gathered=True,
        lifts=len(path.trail) + 1 if mixes(node, path.value) else path.lifts,
    )


def unit_axis(shadow: torch.Tensor, units: int) -> int | None:
    """The axis, from the end, along which the units stand in their own order and once each; None if there is none."""
    for axis in range(shadow.dim()):
        if shadow.shape[axis] == units:
            order = torch.arange(units, dtype=shadow.dtype).view(-1, *[1] * (shadow.dim() - axis - 1))
            if bool((shadow == order).all()):
                return axis - shadow.dim()
    return None
