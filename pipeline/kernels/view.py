"""What several primitives need of one batch, computed once.

Layer 1: pure torch, no I/O. A `View` is a batch's `Presentations` with lazy properties; it lives as long as one call
of the reference kernel. Invariant: a presentation that is masked, or at which a unit's z or a is NaN or infinite, is
no part of any number of that unit.

Shapes: L entries, S positions, U units, N rows.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

import torch

from pipeline.hashing import row_hash
from pipeline.kernels.match import Form, Match, by_unit, match
from pipeline.kernels.places import Places, greatest_by_row, greatest_places
from pipeline.sites import Presentations


@dataclass(frozen=True, eq=False)
class View(Presentations):
    """Presentations, and what follows from them."""

    @classmethod
    def of(cls, presentations: Presentations) -> View:
        """The view of a batch; a view is its own."""
        if isinstance(presentations, cls):
            return presentations
        return cls(**{field.name: getattr(presentations, field.name) for field in fields(Presentations)})

    def knowing(self, **known: object) -> View:
        """The same view with some of its properties known already, as a kernel that has seen the batch found them."""
        view = View(**{field.name: getattr(self, field.name) for field in fields(Presentations)})
        vars(view).update(known)
        return view

    @cached_property
    def _finite_LSU(self) -> torch.Tensor | None:
        shown = [self.z_LSU] if self.a_LSU is self.z_LSU else [self.z_LSU, self.a_LSU]
        if all(_is_finite(value_LSU) for value_LSU in shown):
            return None
        return self.z_LSU.isfinite() & self.a_LSU.isfinite()

    @cached_property
    def valid_LSU(self) -> torch.Tensor | None:
        """Which presentations count for which unit; None if all do."""
        if self.mask_LS is None:
            return self._finite_LSU
        mask_LSU = self.mask_LS[:, :, None].expand(self.z_LSU.shape)
        return mask_LSU if self._finite_LSU is None else mask_LSU & self._finite_LSU

    @cached_property
    def n_U(self) -> torch.Tensor:
        """Presentations that count, int64."""
        if self.valid_LSU is None:
            return torch.full((self.site.units,), self.entries * self.positions, device=self.z_LSU.device)
        return self.valid_LSU.sum((0, 1))

    @cached_property
    def nonfinite_U(self) -> torch.Tensor:
        """Unmasked presentations at which z or a is NaN or infinite, int64."""
        shown = self.entries * self.positions if self.mask_LS is None else self.mask_LS.sum()
        return shown - self.n_U

    @cached_property
    def z64_LSU(self) -> torch.Tensor:
        """The gate's input in float64, 0 where it does not count."""
        return self.counted(self.z_LSU)

    @cached_property
    def a64_LSU(self) -> torch.Tensor:
        """The gate's output in float64, 0 where it does not count."""
        return self.z64_LSU if self.a_LSU is self.z_LSU else self.counted(self.a_LSU)

    def counted(self, value_LSU: torch.Tensor, otherwise: float = 0.0) -> torch.Tensor:
        """A value of each presentation in float64, `otherwise` where it does not count."""
        return fill_unless(self.valid_LSU, value_LSU.double(), otherwise)

    @cached_property
    def fired_LSU(self) -> torch.Tensor:
        """Where a unit fires: z > 0 at a presentation that counts."""
        return self.z64_LSU > 0

    @cached_property
    def cosine(self) -> Match:
        """The cosine of x and w at every presentation; undefined where it does not count."""
        return self._match("cosine")

    @cached_property
    def pearson(self) -> Match:
        """The correlation of x and w at every presentation; undefined where it does not count."""
        return self._match("pearson")

    def _match(self, form: Form) -> Match:
        affine_LSU, counted_LSU = self.z64_LSU, self.valid_LSU
        if self.affine_LSU is not None:
            finite_LSU = self.affine_LSU.isfinite()
            affine_LSU = self.affine_LSU.double().masked_fill(~finite_LSU, 0)
            counted_LSU = finite_LSU if counted_LSU is None else counted_LSU & finite_LSU
        found = match(self.site, form, affine_LSU, by_unit(self.site, self.input_sums()))
        if counted_LSU is None:
            return found
        return found._replace(defined=counted_LSU if found.defined is None else found.defined & counted_LSU)

    @cached_property
    def greatest(self) -> Places:
        """Where each row drives each unit most."""
        return greatest_places(self, self.counted(self.z64_LSU, -torch.inf))

    @cached_property
    def smallest(self) -> Places:
        """Where each row drives each unit least; the value is −z."""
        return greatest_places(self, self.counted(-self.z64_LSU, -torch.inf))

    @cached_property
    def best_match(self) -> Places:
        """Where each row matches each pattern best by correlation."""
        return greatest_places(self, fill_unless(self.pearson.defined, self.pearson.value, -torch.inf))

    @property
    def row_fired_NU(self) -> torch.Tensor:
        """Whether the unit fires at some position of the row."""
        return self.greatest.value_NU > 0

    @cached_property
    def row_a_NU(self) -> torch.Tensor:
        """The greatest a over the positions of each row, −inf where none counts."""
        return greatest_by_row(self, self.counted(self.a64_LSU, -torch.inf))

    def hash_NU(self, seed: int) -> torch.Tensor:
        """The hash of (seed, unit, uid), int64 ≥ 0."""
        unit_U = torch.arange(self.site.units, device=self.uid_N.device)
        return row_hash(self.uid_N[:, None], seed=seed, unit=unit_U[None, :])


def fill_unless(kept: torch.Tensor | None, value: torch.Tensor, otherwise: float) -> torch.Tensor:
    """The value where it is kept (None: everywhere), else `otherwise`."""
    return value if kept is None else value.masked_fill(~kept, otherwise)


def _is_finite(value: torch.Tensor) -> bool:
    # extremes pass NaN on, and are found in half the time of isfinite()
    return value.numel() == 0 or bool(torch.stack(value.aminmax()).isfinite().all())
