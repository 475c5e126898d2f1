"""The lazy x of one presented call: explicit patches of any entries, and the sums over all of them, once.

Layer 1: pure torch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial

import torch

from pipeline.flow.lazy import Normed
from pipeline.flow.patches import Contraction, Geometry
from pipeline.flow.rows import Rows
from pipeline.input_forms import InputSums, Windows
from pipeline.kernels import native_sums


class Inputs:
    """`source` gives x when it is first asked for; `groups` chooses among the groups of the call.

    `enter` does what the geometry's does, where the caller knows a shorter way.
    """

    def __init__(
        self,
        geometry: Geometry,
        source: Callable[[], torch.Tensor],
        rows: Rows,
        *,
        groups: torch.Tensor | None = None,
        enter: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.geometry = geometry
        self.groups = groups
        self._source = source
        self._rows = rows
        self._enter = enter or partial(geometry.enter, rows=rows)
        self._sums: InputSums | None = None

    @cached_property
    def entries(self) -> torch.Tensor:
        """x as `Geometry.enter` gives it."""
        return self._enter(self._source())

    def are(self, other: Inputs) -> bool:
        """Whether these are other inputs of the same tensor: the same geometry, rows, and all groups."""
        same = self.geometry == other.geometry and self._rows is other._rows
        return same and self.groups is None and other.groups is None

    def patches(self, start: int, stop: int) -> torch.Tensor:
        """x of entries start … stop, (l, S, G, D)."""
        return self._chosen(self.geometry.patches(self.entries[start:stop]))

    def patches_at(self, start: int, stop: int, index_lK: torch.Tensor) -> torch.Tensor:
        """x at K positions of each of the entries start … stop, (l, K, G, D)."""
        return self._chosen(self.geometry.patches_at(self.entries[start:stop], index_lK))

    def windows(self, start: int, stop: int) -> Windows:
        """x of entries start … stop as windows; where `has_windows`."""
        return self.geometry.windows(self.entries[start:stop])

    def has_windows(self, fan_in: int) -> bool:
        """Whether x can be had as windows for all groups of the call."""
        return self.groups is None and self.geometry.has_windows(fan_in)

    def _chosen(self, patches_LSGD: torch.Tensor) -> torch.Tensor:
        return patches_LSGD if self.groups is None else patches_LSGD[:, :, self.groups.to(patches_LSGD.device)]

    def sums(self) -> InputSums:
        """The sums over every presentation, computed at the first call."""
        if self._sums is None:
            sums = self._of_norm() or self.geometry.input_sums(self.entries)
            if self.groups is not None:
                chosen = self.groups.to(sums.sum_LSG.device)
                sums = InputSums(*[part[..., chosen] for part in (sums.sum_LSG, sums.square_LSG, sums.centred_LSG)])
            self._sums = sums
        return self._sums

    def _of_norm(self) -> InputSums | None:
        """The sums of what a norm gives without its gain, from what it was given; None where it must be made."""
        source = self._source
        if not isinstance(source, Normed) or source.moments is None or not isinstance(self.geometry, Contraction):
            return None
        x, x_LSGD = source.x, self._enter(source.x)
        # a copy may have its vectors in another order
        return native_sums.of_norm(x_LSGD, *source.moments) if x_LSGD.data_ptr() == x.data_ptr() else None

    def padded(self) -> torch.Tensor | None:
        """Which positions touch padding."""
        return self.geometry.padded_S(self.entries) if self.geometry.pads else None
