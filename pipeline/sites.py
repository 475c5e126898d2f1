"""The nouns of a measurement: a Site, its units' patterns, and the Presentations of one batch to them.

Layer 1: pure torch, no I/O. What makes sites is `flow/` (it follows the data through a probe batch); what consumes
presentations is `kernels/` and `statistics/`.

Shapes: L leading entries (rows, or nodes or windows of rows), S positions of an entry, U units, G groups of units that
share their inputs, D fan-in of a unit, N rows of the batch. `z_LSU` may be any strided view of what the model computed:
a convolution's (N, U, H, W) output arrives as a view of shape (N, H·W, U), never as a transposed copy.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch

from pipeline.input_forms import InputSums, Windows

T = TypeVar("T")

# Gates that are no nonlinearity: nothing about firing is defined behind them.
NOT_FIRING = frozenset({"identity", "null", "fm_square"})


@dataclass(frozen=True)
class InputSpace:
    """What the D inputs of a site's units mean, so that a pattern can be read.

    kind      "pixels" (channel, *offsets), "lags" (channel, lag), "units" (of an upstream site), "features", …
    shape     the shape that a pattern of D numbers takes, e.g. (1, 8, 8) or (16, 3, 3); its product is D
    names     a name for each of the D inputs where the source gives one, else empty
    upstream  names of the sites whose units these inputs are, in order, where the data flow shows it, else empty
    upstream_unit  for each of the shape[0] input channels (or D inputs) the (index into `upstream`, unit), else empty
    field     receptive field in the model's input as (size, stride, offset) per axis, else empty
    """

    kind: str
    shape: tuple[int, ...]
    names: tuple[str, ...] = ()
    upstream: tuple[str, ...] = ()
    upstream_unit: tuple[tuple[int, int], ...] = ()
    field: tuple[tuple[int, int, int], ...] = ()


class PatternScales(NamedTuple):
    """Of each unit's pattern: ‖w‖, its mean w̄, and ‖w − w̄‖; float64."""

    norm_U: torch.Tensor
    mean_U: torch.Tensor
    centred_norm_U: torch.Tensor


class UnitNumbers(NamedTuple):
    """`PatternScales` on some device, and of each unit its bias (float64) and its group (int64)."""

    norm_U: torch.Tensor
    mean_U: torch.Tensor
    centred_norm_U: torch.Tensor
    bias_U: torch.Tensor
    group_U: torch.Tensor


@dataclass(frozen=True, eq=False)
class Site:
    """One place where an affine map is applied to data: statistics.md calls its output channels *units*.

    name        unique in the model: the path of the weight's owner, "#k" appended for its k-th call (k ≥ 1)
    index       order in the forward pass, from 0
    kind        "dense", "conv1d", "conv2d", "conv3d", "conv_transpose2d", "graph", "fm", "lstm", …
    gate        the nonlinearity that consumes the output ("relu", "gelu", …); see NOT_FIRING
    norm        a data-dependent norm between the affine map and the gate, by its module path, else None
    folded      paths of the norms folded into the pattern (BatchNorm behind, LayerNorm's gain before)
    pattern_UD  float64 on the CPU, the effective weights; with groups, D is the fan-in of one unit
    bias_U      float64 on the CPU, the effective bias (0 where the map has none)
    raw_UD      the weights before folding, float64 on the CPU
    up_UD       of a gated pair the pattern of the other branch, else None
    error       max |w·x + b − z| over the probe batch, divided by max(‖w‖‖x‖ + |b|); None where none is finite
    row_fraction  share of the rows that it is measured on, drawn by the hash of their uid
    note        why anything about the site is not as it usually is, else None
    whole       of a part the site that it is of, whose unit `first` is the part's first one, else None
    """

    name: str
    path: str
    call: int
    index: int
    kind: str
    gate: str
    pattern_UD: torch.Tensor
    bias_U: torch.Tensor
    raw_UD: torch.Tensor
    inputs: InputSpace
    groups: int = 1
    norm: str | None = None
    folded: tuple[str, ...] = ()
    alias_of: str | None = None
    up_UD: torch.Tensor | None = None
    error: float | None = 0.0
    row_fraction: float = 1.0
    note: str | None = None
    whole: Site | None = None
    first: int = 0

    def part(self, first: int, stop: int) -> Site:
        """The units first…stop as a site of their own, of a site whose units all share their inputs."""
        return replace(
            self,
            pattern_UD=self.pattern_UD[first:stop],
            bias_U=self.bias_U[first:stop],
            raw_UD=self.raw_UD[first:stop],
            up_UD=None if self.up_UD is None else self.up_UD[first:stop],
            whole=self,
            first=first,
        )

    @property
    def units(self) -> int:
        """How many units (output channels) the site has."""
        return int(self.pattern_UD.shape[0])

    @property
    def fan_in(self) -> int:
        """How many numbers a unit's pattern has."""
        return int(self.pattern_UD.shape[1])

    @property
    def fires(self) -> bool:
        """Whether firing (z > 0) means anything here."""
        return self.gate not in NOT_FIRING

    @property
    def group_U(self) -> torch.Tensor:
        """The group of each unit, int64."""
        return torch.arange(self.units) // (self.units // self.groups)

    @cached_property
    def scales(self) -> PatternScales:
        """What match needs of the patterns, computed once."""
        pattern_UD = self.pattern_UD.double()
        mean_U = pattern_UD.mean(1)
        return PatternScales(pattern_UD.norm(dim=1), mean_U, (pattern_UD - mean_U[:, None]).norm(dim=1))

    def numbers_on(self, device: torch.device) -> UnitNumbers:
        """What match needs of the units on a device, moved there once: each copy to a GPU waits for what it does."""
        if device not in self._numbers:
            numbers = (*self.scales, self.bias_U, self.group_U)
            self._numbers[device] = UnitNumbers(*(one.to(device) for one in numbers))
        return self._numbers[device]

    @cached_property
    def _numbers(self) -> dict[torch.device, UnitNumbers]:
        return {}


@dataclass(frozen=True)
class Unread:
    """A weight that acts in the forward pass and is not interpreted, or a parameter that never acts: never silent."""

    name: str
    reason: str
    parameters: int
    acts: bool = True


@dataclass(frozen=True, eq=False)
class Presentations:
    """Every meeting of one batch's inputs with one site.

    z_LSU       the gate's real input (the folded affine output, or its norm's output where `site.norm`)
    a_LSU       the gate's output; the same tensor as z_LSU for gate "identity"; of a gated pair φ(z)·up
    affine_LSU  w·x + b in the space of `site.pattern_UD`; None where it is z_LSU itself
    uid_N       int64 uid of each row of the batch; label_N its class (unknown outside 0 … classes − 1) or None
    label_LS    int64 class of each presentation where positions have labels and the site's are those, else None
    row_L       int64, which row of the batch each entry belongs to; None where entry i is row i (then L = N)
    mask_LS     bool, False where the position is padding or absent; None if all are presentations
    position_LS int64 number of each position within its row; None where it is 0 … S−1
    padded_S    bool, the position's input touches the layer's zero (or other) padding; None where none does
    patches     `patches(start, stop)` gives x of entries start…stop as (l, S, G, D), in the dtype of the model
    input_sums  lazily, once: `InputSums` of all presentations
    patches_at  `patches_at(start, stop, index_lK)` gives x at K positions of each entry as (l, K, G, D), where that is
                less work than all patches; else None
    windows     `windows(start, stop)` gives x of entries start…stop uncopied, where it is a window's; else None
    memo        what is the same at every site of the batch for the same rows, see `remembered`
    gradient_LSU   ∂(sum of row losses)/∂a where a backward pass was run, else None
    """

    site: Site
    z_LSU: torch.Tensor
    a_LSU: torch.Tensor
    uid_N: torch.Tensor
    patches: Callable[[int, int], torch.Tensor]
    input_sums: Callable[[], InputSums]
    label_N: torch.Tensor | None = None
    affine_LSU: torch.Tensor | None = None
    row_L: torch.Tensor | None = None
    mask_LS: torch.Tensor | None = None
    position_LS: torch.Tensor | None = None
    padded_S: torch.Tensor | None = None
    classes: int = field(default=0, kw_only=True)
    memo: dict[Any, Any] = field(default_factory=dict, kw_only=True)
    gradient_LSU: torch.Tensor | None = field(default=None, kw_only=True)
    label_LS: torch.Tensor | None = field(default=None, kw_only=True)
    patches_at: Callable[[int, int, torch.Tensor], torch.Tensor] | None = field(default=None, kw_only=True)
    windows: Callable[[int, int], Windows] | None = field(default=None, kw_only=True)

    @property
    def entries(self) -> int:
        """How many leading entries there are, L."""
        return int(self.z_LSU.shape[0])

    @property
    def positions(self) -> int:
        """How many positions an entry has, S."""
        return int(self.z_LSU.shape[1])

    @property
    def rows(self) -> int:
        """How many rows the batch has, N."""
        return int(self.uid_N.shape[0])

    @property
    def row_index_L(self) -> torch.Tensor:
        """The row of each entry, int64, also where `row_L` is None."""
        if self.row_L is not None:
            return self.row_L
        return torch.arange(self.entries, device=self.z_LSU.device)

    def remembered(self, key: Hashable, made: Callable[[], T]) -> T:
        """What follows from the batch's uids and labels alone: made once for all sites that are shown the same rows."""
        # the uids are kept with it, so that their id stays theirs
        found = self.memo.get((key, id(self.uid_N)))
        if found is None:
            found = self.memo[key, id(self.uid_N)] = (self.uid_N, made())
        return found[1]  # type: ignore[no-any-return]

    def among(self, *, classes: int, memo: dict[Any, Any]) -> Presentations:
        """The same among so many classes, with a batch's memo: as `replace`, which takes every field by itself."""
        made = object.__new__(Presentations)
        vars(made).update(vars(self), classes=classes, memo=memo)
        return made

    def select_rows(self, keep_N: torch.Tensor) -> Presentations:
        """The presentations of the rows where the bool `keep_N` is True, in the same order."""
        index_L = keep_N[self.row_index_L].nonzero()[:, 0]
        renumbered_N = keep_N.cumsum(0) - 1
        chosen = _Chosen(self, index_L)

        def of(value: torch.Tensor | None) -> torch.Tensor | None:
            return None if value is None else value[index_L]

        return replace(
            self,
            z_LSU=self.z_LSU[index_L],
            a_LSU=self.a_LSU[index_L],
            affine_LSU=of(self.affine_LSU),
            uid_N=self.uid_N[keep_N],
            label_N=None if self.label_N is None else self.label_N[keep_N],
            row_L=None if self.row_L is None else renumbered_N[self.row_L[index_L]],
            mask_LS=of(self.mask_LS),
            position_LS=of(self.position_LS),
            label_LS=of(self.label_LS),
            gradient_LSU=of(self.gradient_LSU),
            patches=chosen.patches,
            patches_at=None if self.patches_at is None else chosen.patches_at,
            windows=None if self.windows is None else chosen.windows,
            input_sums=chosen.input_sums,
        )


class _Chosen(NamedTuple):
    """The inputs of some entries of presentations, run by run: those of what lies between two are never made."""

    whole: Presentations
    index_L: torch.Tensor

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Where in the whole the entries start…stop of those chosen are, neighbours together."""
        wanted = self.index_L[start:stop].cpu()
        if len(wanted) == 0:
            yield 0, 0
            return
        for run in wanted.tensor_split((wanted.diff() != 1).nonzero()[:, 0] + 1):
            yield int(run[0]), int(run[-1]) + 1

    def patches(self, start: int, stop: int) -> torch.Tensor:
        return torch.cat([self.whole.patches(first, last) for first, last in self.runs(start, stop)])

    def patches_at(self, start: int, stop: int, index_lK: torch.Tensor) -> torch.Tensor:
        assert self.whole.patches_at is not None
        parts, done = [], 0
        for first, last in self.runs(start, stop):
            parts.append(self.whole.patches_at(first, last, index_lK[done : done + last - first]))
            done += last - first
        return torch.cat(parts)

    def windows(self, start: int, stop: int) -> Windows:
        assert self.whole.windows is not None
        parts = [self.whole.windows(first, last) for first, last in self.runs(start, stop)]
        if len(parts) == 1:
            return parts[0]
        return parts[0]._replace(x_LCs=torch.cat([part.x_LCs for part in parts]))

    def input_sums(self) -> InputSums:
        sums, index_L = self.whole.input_sums(), self.index_L
        return InputSums(sums.sum_LSG[index_L], sums.square_LSG[index_L], sums.centred_LSG[index_L])
