"""Rows of a table: columns of numbers, standardised, and columns of categories, numbered by a vocabulary.

Layer 1: no I/O.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.hashing import digest
from pipeline.names import Names
from pipeline.rows.decode import column_features
from pipeline.rows.features import FeatureFormat, Part, Role, Usable, is_name, is_number
from pipeline.rows.tally import UNSEEN, Numbering, Vocabulary


@dataclass(frozen=True)
class Table(FeatureFormat):
    """`numbers` as x (D,) = (value − mean) / std where the vocabulary has scales, `categories` as int64 (K,).

    A null number makes its row unusable; a null category is unknown, as is one that training has not seen.
    """

    numbers: tuple[str, ...]
    categories: tuple[str, ...]
    vocabulary: Vocabulary

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """One number of each column."""
        return (len(self.numbers),)

    @property
    def columns(self) -> tuple[str, ...]:
        """Numbers, then categories."""
        return (*self.numbers, *self.categories)

    @property
    def encoded(self) -> tuple[str, ...]:
        """The categories."""
        return self.categories

    @property
    def parts(self) -> tuple[Part, ...]:
        """Numbers and, where there are any, categories."""
        parts = (Part(self.shape, torch.float32), Part((len(self.categories),), torch.int64))
        return parts if self.categories else parts[:1]

    @property
    def identity(self) -> dict[str, Any]:
        """The columns and what their values become."""
        known = digest([[name, list(values)] for name, values in self.vocabulary.values.items()])
        scales = [[name, *scale] for name, scale in self.vocabulary.scales.items()]
        return {"numbers": self.numbers, "categories": self.categories, "values": known, "scales": scales}

    @property
    def names(self) -> Names:
        """The columns', and the values that training has seen."""
        values = tuple((UNSEEN, *self.vocabulary.values[name]) for name in self.categories)
        return Names(features=self.numbers, fields=self.categories, values=values)

    def roles(self) -> Iterator[Role]:
        """Numbers, and anything that has a name."""
        for name in self.numbers:
            yield Role(name, "numbers", is_number)
        for name in self.categories:
            yield Role(name, "strings or integers", is_name)

    @cached_property
    def _numberings(self) -> dict[str, Numbering]:
        return {name: Numbering(self.vocabulary.values[name]) for name in self.categories}

    def decode(self, rows: pa.RecordBatch) -> Usable:
        """Standardised numbers and numbered categories."""
        x_ND, usable_N, reason = np.zeros((rows.num_rows, 0)), np.ones(rows.num_rows, dtype=bool), ""
        if self.numbers:
            columns = [rows[name] for name in self.numbers]
            x_ND, usable_N, reason = column_features(columns, self.numbers, dtype=np.float64)
        scale_D2 = np.array([self.vocabulary.scales.get(name, (0.0, 1.0)) for name in self.numbers]).reshape(-1, 2)
        x_ND = (x_ND - scale_D2[:, 0]) / scale_D2[:, 1]
        known = [self._numberings[name].of(rows[name]) for name in self.categories]
        return Usable((x_ND, _together(known, usable_N)) if known else (x_ND,), usable_N, reason)


def _together(columns: Sequence[np.ndarray], usable_N: np.ndarray) -> np.ndarray:
    stacked = np.stack(columns, 1)
    return stacked if usable_N.all() else stacked[usable_N]
