"""How an affine operation meets its input: explicit patches, the sums over them, and its units as a matrix.

Layer 1: pure torch. A geometry describes one call; it never holds tensors, so it can be kept beside a pattern.

Shapes: L entries, S positions, U units, G groups, D fan-in of a unit.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from string import ascii_letters

import torch
from torch.nn import functional

from pipeline.flow.layout import Arranged, arrange
from pipeline.flow.rows import Rows
from pipeline.input_forms import InputSums, LaidWindows, Windows, WindowShape
from pipeline.kernels import native_sums

# channels of a group from which windows are copied faster with the channels side by side
CHANNELS = 8


class Geometry(ABC):
    """One way in which an affine operation presents its input to its units."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """The site's kind."""

    @property
    def groups(self) -> int:
        """Groups of units that share their inputs."""
        return 1

    @property
    def pads(self) -> bool:
        """Whether any presentation may touch padding."""
        return False

    @property
    @abstractmethod
    def unit_axes(self) -> tuple[int, ...]:
        """The axes of the output that number the units, from the end."""

    @abstractmethod
    def matrix_UD(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight operand as one row per unit."""

    @abstractmethod
    def pattern_shape(self, weight: torch.Tensor) -> tuple[int, ...]:
        """The shape in which one unit's D numbers are read."""

    @abstractmethod
    def carries(self, rows: Rows) -> bool:
        """Whether the rows of the input are entries or positions of the site."""

    @abstractmethod
    def enter(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """The input with its entries along the first axis, as `patches` takes it."""

    def leave(self, out: torch.Tensor, rows: Rows) -> Arranged:
        """The output as entries × positions × units."""
        return arrange(out, rows, self.unit_axes)

    def patches_at(self, entries: torch.Tensor, index_lK: torch.Tensor) -> torch.Tensor:
        """The explicit inputs (l, K, G, D) at K positions of each entry."""
        return self.patches(entries).take_along_dim(index_lK[:, :, None, None], 1)

    @abstractmethod
    def patches(self, entries: torch.Tensor) -> torch.Tensor:
        """The explicit inputs (l, S, G, D) of some entries."""

    def has_windows(self, fan_in: int) -> bool:
        """Whether `windows` is less work than `patches` for units of this fan-in."""
        return False

    def windows(self, entries: torch.Tensor) -> Windows:
        """The inputs of some entries as a view of less memory; where `has_windows`."""
        raise NotImplementedError

    def input_sums(self, entries: torch.Tensor) -> InputSums:
        """Σx, Σx² and Σ(x − x̄)² of every presentation in float64; by patches unless there is a shorter way."""
        return sums_of(self.patches(entries))

    def padded_S(self, entries: torch.Tensor) -> torch.Tensor | None:
        """Which positions touch padding; None where none does."""
        return None


def sums_of(patches_LSGD: torch.Tensor) -> InputSums:
    """Σx, Σx² and Σ(x − x̄)² of explicit patches, in float64."""
    fused = native_sums.of_vectors(patches_LSGD)
    if fused is not None:
        return fused
    patches = patches_LSGD.double()
    sum_LSG = patches.sum(-1)
    centred = patches - (sum_LSG / max(patches.shape[-1], 1))[..., None]
    return InputSums(sum_LSG, patches.square().sum(-1), centred.square().sum(-1))


@dataclass(frozen=True)
class Contraction(Geometry):
    """A product of data and weight summed over the labels that the output lacks, as in einsum: one letter per axis.

    Labels of weight and output alone number units; of all three, groups; of data and output, rows and positions.
    """

    x_labels: str
    weight_labels: str
    out_labels: str
    group_count: int = 1

    @property
    def kind(self) -> str:
        """Every contraction is dense."""
        return "dense"

    @property
    def groups(self) -> int:
        """See `Geometry`."""
        return self.group_count

    @property
    def _inputs(self) -> str:
        return "".join(label for label in self.x_labels if label in self.weight_labels and label not in self.out_labels)

    @property
    def _groups(self) -> str:
        return "".join(label for label in self.out_labels if label in self.x_labels and label in self.weight_labels)

    @property
    def _units(self) -> str:
        return "".join(label for label in self.out_labels if label not in self.x_labels)

    @property
    def unit_axes(self) -> tuple[int, ...]:
        """See `Geometry`; groups come first."""
        return tuple(self.out_labels.index(label) - len(self.out_labels) for label in self._groups + self._units)

    def matrix_UD(self, weight: torch.Tensor) -> torch.Tensor:
        """See `Geometry`."""
        outer, inner = self._groups + self._units, self._inputs
        lone = "".join(label for label in self.weight_labels if label not in outer + inner)
        ordered = weight.permute([self.weight_labels.index(label) for label in outer + inner + lone])
        return ordered.reshape(math.prod(ordered.shape[: len(outer)]), -1)

    def pattern_shape(self, weight: torch.Tensor) -> tuple[int, ...]:
        """See `Geometry`."""
        return tuple(weight.shape[self.weight_labels.index(label)] for label in self._inputs)

    def carries(self, rows: Rows) -> bool:
        """Unless the rows are summed over, or are groups with a weight each."""
        return rows.axis is None or self.x_labels[rows.axis] not in self.weight_labels

    def enter(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """(L, S, G, D), positions in the order of the output's axes."""
        # a broadcast axis of size 1 has a label that neither weight nor output knows
        x = x if x.layout is torch.strided else x.to_dense()
        own = [label for label in self.x_labels if label not in self.weight_labels]
        kept = sorted(own, key=self.out_labels.find)
        order = [self.x_labels.index(label) for label in [*kept, *self._groups, *self._inputs]]
        axis = None if rows.axis is None else kept.index(self.x_labels[rows.axis])
        channels = range(len(kept), len(order))
        flat = arrange(x.permute(order), Rows(axis, rows.rows, rows.inner, rows.index), channels).tensor
        return torch.unflatten(flat, 2, (self.group_count, flat.shape[2] // self.group_count))

    def patches(self, entries: torch.Tensor) -> torch.Tensor:
        """See `Geometry`."""
        return entries


def dense(dims: int) -> Contraction:
    """z = x Wᵀ along the last of `dims` axes, as a linear layer."""
    lead = ascii_letters[2 : dims + 1]
    return Contraction(lead + "a", "ba", lead + "b")


@dataclass(frozen=True)
class Convolution(Geometry):
    """A convolution with explicit zero padding (before, after) per spatial axis; entries are (l, C, *spatial)."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    conv_groups: int

    @property
    def kind(self) -> str:
        """conv1d, conv2d or conv3d."""
        return f"conv{len(self.kernel)}d"

    @property
    def groups(self) -> int:
        """See `Geometry`."""
        return self.conv_groups

    @property
    def unit_axes(self) -> tuple[int, ...]:
        """See `Geometry`."""
        return (-1 - len(self.kernel),)

    def matrix_UD(self, weight: torch.Tensor) -> torch.Tensor:
        """See `Geometry`."""
        return weight.flatten(1)

    def pattern_shape(self, weight: torch.Tensor) -> tuple[int, ...]:
        """(channels of a group, *kernel)."""
        return tuple(weight.shape[1:])

    @property
    def pads(self) -> bool:
        """See `Geometry`."""
        return any(size for pair in self.padding for size in pair)

    def carries(self, rows: Rows) -> bool:
        """Along the batch axis only."""
        return rows.axis in (None, 0)

    def enter(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """See `Geometry`."""
        return x if x.dim() == len(self.kernel) + 2 else x.unsqueeze(0)

    def leave(self, out: torch.Tensor, rows: Rows) -> Arranged:
        """See `Geometry`."""
        return leave_images(out, rows, len(self.kernel))

    def _padded(self, x: torch.Tensor) -> torch.Tensor:
        flat = [size for pair in reversed(self.padding) for size in pair]
        return functional.pad(x, flat) if any(flat) else x

    def patches(self, entries: torch.Tensor) -> torch.Tensor:
        """Gather the kernel's window at every output position, padding included."""
        windows = self._windows(entries)
        positions = math.prod(windows.shape[1 : 1 + len(self.kernel)])
        inputs = math.prod(windows.shape[2 + len(self.kernel) :])
        return windows.reshape(len(windows), positions, self.conv_groups, inputs)

    def patches_at(self, entries: torch.Tensor, index_lK: torch.Tensor) -> torch.Tensor:
        """Gather the kernel's window at the chosen output positions only."""
        windows = self._windows(entries)
        entry_l1 = torch.arange(len(entries), device=entries.device)[:, None]
        at = torch.unravel_index(index_lK, windows.shape[1 : 1 + len(self.kernel)])
        return windows[entry_l1, *at].flatten(3)

    def has_windows(self, fan_in: int) -> bool:
        """Of few channels a window is many short runs of memory, side by side or not."""
        return self.conv_groups == 1 or fan_in >= CHANNELS * math.prod(self.kernel)

    def windows(self, entries: torch.Tensor) -> Windows:
        """See `Geometry`."""
        return Windows(entries, WindowShape(self.kernel, self.stride, self.dilation, self.padding), self._laid)

    def _laid(self, entries: torch.Tensor) -> LaidWindows:
        """With the channels side by side a window is a few long runs of memory."""
        dims, groups = len(self.kernel), self.conv_groups
        x = self._channels_last(entries)
        view = self._view(x.movedim(-1, 1))
        view = view.permute(*range(dims + 2), *range(dims + 3, 2 * dims + 3), dims + 2)
        # of each pixel, times how many windows it is in
        norm_LsG = torch.linalg.vector_norm(x.unflatten(-1, (groups, -1)), dim=-1).flatten(1, dims)
        square_G = _covers(self, tuple(x.shape[1:-1]), x.device) @ norm_LsG.square().sum(0, dtype=torch.float64)
        pixels = max(1, math.prod(x.shape[:-1]))
        mean_GC = (x.new_ones(pixels) @ x.flatten(0, -2) / pixels).double().view(groups, -1)
        far_G = mean_GC.square().sum(1) * (math.prod(self.kernel) * math.prod(view.shape[: dims + 1]))
        return LaidWindows(view, square_G, far_G)

    def _channels_last(self, entries: torch.Tensor) -> torch.Tensor:
        """The padded input as (l, *spatial, C), contiguous, in float32 at least."""
        sizes = [size + sum(pair) for size, pair in zip(entries.shape[2:], self.padding, strict=True)]
        dtype = torch.promote_types(entries.dtype, torch.float32)
        x = entries.new_zeros((len(entries), *sizes, entries.shape[1]), dtype=dtype)
        inside = x
        for axis, (size, (before, _)) in enumerate(zip(entries.shape[2:], self.padding, strict=True), start=1):
            inside = inside.narrow(axis, before, size)
        inside.copy_(entries.movedim(1, -1))
        return x

    def _windows(self, entries: torch.Tensor) -> torch.Tensor:
        """The window at every output position, as a view (l, *positions, G, channels of a group, *kernel)."""
        return self._view(self._padded(entries))

    def _view(self, x: torch.Tensor) -> torch.Tensor:
        axes = zip(x.shape[2:], self.dilation, self.kernel, self.stride, strict=True)
        out = [(size - dilation * (kernel - 1) - 1) // stride + 1 for size, dilation, kernel, stride in axes]
        steps = x.stride()
        spatial = [step * stride for step, stride in zip(steps[2:], self.stride, strict=True)]
        window = [step * dilation for step, dilation in zip(steps[2:], self.dilation, strict=True)]
        view = x.as_strided((*x.shape[:2], *out, *self.kernel), (*steps[:2], *spatial, *window), x.storage_offset())
        dims = len(out)
        view = torch.unflatten(view, 1, (self.conv_groups, -1))
        return view.permute(0, *range(3, 3 + dims), 1, 2, *range(3 + dims, 3 + 2 * dims))

    def input_sums(self, entries: torch.Tensor) -> InputSums:
        """By convolution with ones; centred around 0 or the entry's own mean, whichever cancels less."""
        fused = native_sums.of_windows(
            entries,
            groups=self.conv_groups,
            kernel=self.kernel,
            stride=self.stride,
            dilation=self.dilation,
            padding=self.padding,
        )
        if fused is not None:
            return fused
        x = entries.double()
        channels, groups = x.shape[1], self.conv_groups
        finite = torch.where(torch.isfinite(x), x, 0.0)
        mean = finite.flatten(1).mean(1).view(-1, *[1] * x.dim())
        x = torch.unflatten(self._padded(x), 1, (groups, channels // groups))
        sum_, square = self._box(x.sum(2)), self._box(x.square().sum(2))
        shifted = x - mean
        shifted_sum, shifted_square = self._box(shifted.sum(2)), self._box(shifted.square().sum(2))
        count = channels // groups * math.prod(self.kernel)
        around = shifted_square < square
        centred = torch.where(around, shifted_square, square) - torch.where(around, shifted_sum, sum_).square() / count
        return InputSums(*[part.flatten(2).transpose(1, 2) for part in (sum_, square, centred.clamp_min_(0))])

    def _box(self, padded_LGs: torch.Tensor) -> torch.Tensor:
        # sums over the window; one group per channel
        groups, dims = padded_LGs.shape[1], len(self.kernel)
        ones = padded_LGs.new_ones((groups, 1, *self.kernel))
        convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[dims - 1]
        return convolve(padded_LGs, ones, None, self.stride, 0, self.dilation, groups)

    def padded_S(self, entries: torch.Tensor) -> torch.Tensor | None:
        """The window reaches beyond the input."""
        return _outside_S(self, tuple(entries.shape[2:]), entries.device)


@lru_cache(maxsize=256)
def _outside_S(convolution: Convolution, spatial: tuple[int, ...], device: torch.device) -> torch.Tensor:
    inside = convolution._padded(torch.ones((1, 1, *spatial), device=device))
    return convolution._box(inside).flatten() < math.prod(convolution.kernel) - 0.5


@lru_cache(maxsize=256)
def _covers(convolution: Convolution, padded: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """How many windows each pixel of a padded input is in, float64 (pixels)."""
    count = torch.ones((), dtype=torch.float64)
    for size, kernel, stride, dilation in zip(
        padded, convolution.kernel, convolution.stride, convolution.dilation, strict=True
    ):
        out = (size - dilation * (kernel - 1) - 1) // stride + 1
        met = stride * torch.arange(out)[:, None] + dilation * torch.arange(kernel)
        count = count[..., None] * torch.bincount(met.flatten(), minlength=size)
    return count.flatten().to(device)


def leave_images(out: torch.Tensor, rows: Rows, dims: int) -> Arranged:
    """A convolution's output (N, U, *spatial), or (U, *spatial): its images stay entries, even those of one row."""
    if rows.axis is None and out.dim() == dims + 2:
        index = torch.zeros(1, dtype=torch.int64) if rows.index is None else rows.index
        rows = Rows(0, rows.rows, index=index.expand(out.shape[0]))
    return arrange(out, rows, (-1 - dims,), split=False)
