"""How far a site's output has been followed, and where its units are in a tensor.

Layer 1. A shadow holds for each element of a tensor the number of its unit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from pipeline.flow.gates import Gate
from pipeline.flow.record import Node
from pipeline.flow.values import Value

ABSENT = -1


@dataclass(frozen=True, eq=False)
class Path:
    """How far a site's output has been followed.

    scale_U, shift_U   what is folded so far: z = affine · scale + shift (float64)
    trail              the operations that the model's own z has passed; None once z stands nowhere in the model
    unit_axis          the axis of the units where the trail ends, from the end
    lifts              how many operations of the trail sum over neighbours
    behind             every fold and norm passed, whether z stands there or not
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
    behind: tuple[Node, ...] = ()
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


def once(shadow: torch.Tensor, other: torch.Size | None = None) -> torch.Tensor:
    """The shadow without its repetitions, except along axes where `other`, broadcast against it, is longer than 1."""
    sizes = (1,) * (shadow.dim() - len(other)) + tuple(other) if other is not None else (1,) * shadow.dim()
    for axis, (step, size) in enumerate(zip(shadow.stride(), sizes, strict=False)):
        if step == 0 and size == 1:
            shadow = shadow.narrow(axis, 0, min(1, shadow.shape[axis]))
    return shadow


def unit_axis(shadow: torch.Tensor, units: int, *, likeliest: int) -> int | None:
    """The axis, from the end, along which the units stand in their own order and once each; None if there is none.

    A single unit may stand along any axis of size 1, of a single row too: along the `likeliest`, if that is one.
    """
    for axis in sorted(range(shadow.dim()), key=lambda axis: axis - shadow.dim() != likeliest):
        if shadow.shape[axis] == units:
            order = torch.arange(units, dtype=shadow.dtype).view(-1, *[1] * (shadow.dim() - axis - 1))
            if bool((shadow == order).all()):
                return axis - shadow.dim()
    return None


def per_unit(path: Path, fixed: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor | None:
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
