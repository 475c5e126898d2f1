"""Time series: a column of lists of steps as (C, T), shorter ones filled up and masked.

Layer 1: no I/O.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import torch

from pipeline.batch import Batch
from pipeline.rows.features import FeatureFormat, Part, Role, Usable, is_list, is_number
from pipeline.rows.ragged import Mask, of_lengths, padded, steps


@dataclass(frozen=True)
class Series(FeatureFormat):
    """Steps of C numbers (or plain numbers, C = 1) from the first to at most the T-th, exactly T unless `ragged`."""

    column: str
    shape: tuple[int, ...]
    ragged: bool

    @property
    def columns(self) -> tuple[str, ...]:
        """The column of lists."""
        return (self.column,)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The numbers and, of ragged series, which steps are real."""
        parts = (Part(self.shape, torch.float32), Part(self.shape[1:], torch.bool))
        return parts if self.ragged else parts[:1]

    @property
    def identity(self) -> dict[str, Any]:
        """Its fields."""
        return {"series": asdict(self)}

    @property
    def positions(self) -> int:
        """Its steps."""
        return self.shape[1]

    def roles(self) -> Iterator[Role]:
        """Lists of lists of numbers, or of numbers where there is one channel."""
        channels, most = self.shape
        counts = f"1 to {most}" if self.ragged else f"{most}"
        step = "numbers" if channels == 1 else f"steps, each a list of {channels} numbers"
        yield Role(self.column, f"lists of {counts} {step}", self._fits)

    def _fits(self, kind: pa.DataType) -> bool:
        is_fixed = pa.types.is_fixed_size_list(kind) and self._least <= kind.list_size <= self.shape[1]
        if not (is_fixed or is_list(kind)):
            return False
        step = kind.value_type
        if pa.types.is_fixed_size_list(step):
            return is_number(step.value_type) and step.list_size == self.shape[0]
        return (is_list(step) and is_number(step.value_type)) or (self.shape[0] == 1 and is_number(step))

    @property
    def _least(self) -> int:
        """How many steps a row has at least."""
        return 1 if self.ragged else self.shape[1]

    def decode(self, rows: pa.RecordBatch) -> Usable:
        """Filled up with zeros; a series of another length, or with a null, is not usable."""
        channels, most = self.shape
        found = of_lengths(steps(rows[self.column], channels), self._least, most)
        x_NCT = padded(found, most)
        parts = (x_NCT, Mask(found.length_N))
        return Usable(parts if self.ragged else parts[:1], found.usable_N, found.reason, found.length_N)

    def batch(self, tensors: tuple[torch.Tensor, ...], uid_N: torch.Tensor, label_N: torch.Tensor | None) -> Batch:
        """x, and the mask where series are ragged."""
        return masked(tensors, uid_N, label_N)


def masked(
    tensors: tuple[torch.Tensor, ...], uid_N: torch.Tensor, label_N: torch.Tensor | None, *, narrow: bool = False
) -> Batch:
    """A batch of one input, the last axis of which counts its positions, and, if there are two tensors, its mask."""
    x, *masks = tensors
    mask_NS = masks[0] if masks else None
    kwargs = {} if mask_NS is None else {"mask": mask_NS}
    return Batch((x,), uid_N, label_N, kwargs, mask_NS, position_axes=(-1,), narrow=narrow)
