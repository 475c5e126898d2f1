"""Transposed convolutions: each output phase has a kernel of its own, made of the taps that really meet an input.

Layer 1: pure torch. Output o of a transposed convolution lies at f = o + padding = i·stride + k·dilation; of phase
p = f mod stride are the taps k with k·dilation ≡ p, and there tap k meets input i = (f − k·dilation)/stride.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch

from pipeline.flow.layout import Arranged
from pipeline.flow.patches import Geometry, leave_images
from pipeline.flow.rows import Rows


@dataclass(frozen=True)
class Axis:
    """One spatial axis of a transposed convolution, of `out` outputs."""

    kernel: int
    stride: int
    padding: int
    dilation: int
    out: int

    def taps(self, phase: int) -> list[int]:
        """The taps of the kernel that act in a phase."""
        return [k for k in range(self.kernel) if k * self.dilation % self.stride == phase]

    def first(self, phase: int) -> int:
        """The first output of a phase."""
        return (phase - self.padding) % self.stride

    def met(self, phase: int) -> torch.Tensor:
        """The input that each tap meets at each output of the phase: int64 (outputs, taps), out of range where none."""
        outputs = torch.arange(self.first(phase), self.out, self.stride) + self.padding
        offsets = torch.tensor(self.taps(phase), dtype=torch.int64) * self.dilation
        return (outputs[:, None] - offsets).div(self.stride, rounding_mode="floor")


@dataclass(frozen=True)
class Phase(Geometry):
    """One output phase of a transposed convolution; entries are (l, C, *spatial)."""

    axes: tuple[Axis, ...]
    phase: tuple[int, ...]
    conv_groups: int

    @property
    def kind(self) -> str:
        """conv_transpose1d, conv_transpose2d or conv_transpose3d."""
        return f"conv_transpose{len(self.axes)}d"

    @property
    def groups(self) -> int:
        """See `Geometry`."""
        return self.conv_groups

    @property
    def unit_axes(self) -> tuple[int, ...]:
        """See `Geometry`."""
        return (-1 - len(self.axes),)

    def phases(self) -> list[Phase]:
        """Every phase that some input reaches."""
        every = itertools.product(*[range(axis.stride) for axis in self.axes])
        made = [Phase(self.axes, phase, self.conv_groups) for phase in every]
        return [one for one in made if all(axis.taps(p) for axis, p in zip(one.axes, one.phase, strict=True))]

    def _taps(self, weight: torch.Tensor) -> torch.Tensor:
        for dim, (axis, phase) in enumerate(zip(self.axes, self.phase, strict=True), start=2):
            weight = weight.index_select(dim, torch.tensor(axis.taps(phase), device=weight.device))
        return weight

    def matrix_UD(self, weight: torch.Tensor) -> torch.Tensor:
        """See `Geometry`."""
        kernel = torch.unflatten(self._taps(weight), 0, (self.conv_groups, -1))
        return kernel.transpose(1, 2).flatten(0, 1).flatten(1)

    def pattern_shape(self, weight: torch.Tensor) -> tuple[int, ...]:
        """(channels of a group, *taps of the phase)."""
        return (weight.shape[0] // self.conv_groups, *self._taps(weight).shape[2:])

    @property
    def pads(self) -> bool:
        """See `Geometry`."""
        return True

    def carries(self, rows: Rows) -> bool:
        """Along the batch axis only."""
        return rows.axis in (None, 0)

    def enter(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """See `Geometry`."""
        return x if x.dim() == len(self.axes) + 2 else x.unsqueeze(0)

    def leave(self, out: torch.Tensor, rows: Rows) -> Arranged:
        """The outputs of the phase: every stride-th."""
        for axis, (grid, phase) in enumerate(zip(self.axes, self.phase, strict=True), start=-len(self.axes)):
            out = out.movedim(axis, -1)[..., grid.first(phase) :: grid.stride].movedim(-1, axis)
        return leave_images(out, rows, len(self.axes))

    def patches(self, entries: torch.Tensor) -> torch.Tensor:
        """Gather the inputs that the phase's taps meet; zero where there is none."""
        dims = len(self.axes)
        indices, inside = [], torch.ones((), dtype=torch.bool, device=entries.device)
        for dim, (axis, phase) in enumerate(zip(self.axes, self.phase, strict=True)):
            met = axis.met(phase).to(entries.device)
            shape = [1] * (2 * dim) + list(met.shape) + [1] * (2 * (dims - dim - 1))
            size = entries.shape[2 + dim]
            inside = inside & ((met >= 0) & (met < size)).view(shape)
            indices.append(met.clamp(0, max(size - 1, 0)).view(shape))
        gathered = torch.where(inside, _at(entries, indices), 0.0)
        order = (0, *range(2, 2 + 2 * dims, 2), 1, *range(3, 3 + 2 * dims, 2))
        ordered = gathered.permute(order)
        positions = math.prod(ordered.shape[1 : 1 + dims])
        inputs = math.prod(ordered.shape[1 + dims :]) // self.conv_groups
        return ordered.reshape(entries.shape[0], positions, self.conv_groups, inputs)

    def padded_S(self, entries: torch.Tensor) -> torch.Tensor | None:
        """A tap of the phase meets no input."""
        ones = torch.ones((1, self.conv_groups, *entries.shape[2:]), device=entries.device)
        missing = (self.patches(ones) == 0).flatten(2).any(-1)[0]
        return missing if bool(missing.any()) else None


def _at(entries: torch.Tensor, indices: list[torch.Tensor]) -> torch.Tensor:
    everything = slice(None)
    if len(indices) == 1:
        return entries[everything, everything, indices[0]]
    if len(indices) == 2:
        return entries[everything, everything, indices[0], indices[1]]
    return entries[everything, everything, indices[0], indices[1], indices[2]]
