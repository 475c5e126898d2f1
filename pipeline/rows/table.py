"""Rows of a table: columns of numbers, standardised, and columns of categories, numbered by a vocabulary.

Layer 1: no I/O.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.batch import Batch
from pipeline.hashing import digest
from pipeline.names import Names
from pipeline.rows.decode import plain_numbers, without_null
from pipeline.rows.features import FeatureFormat, Part, Role, Usable, is_name, is_number, narrowest
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
        known = narrowest(max(self.vocabulary.sizes, default=1))
        parts = (Part(self.shape, torch.float32), Part((len(self.categories),), known))
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

    def batch(self, tensors: tuple[torch.Tensor, ...], uid_N: torch.Tensor, label_N: torch.Tensor | None) -> Batch:
        """Numbers and categories, those in as few bytes as they need."""
        return Batch(inputs=tensors, uid_N=uid_N, label_N=label_N, narrow=True)

    @cached_property
    def _numberings(self) -> tuple[Numbering, ...]:
        return tuple(Numbering(self.vocabulary.values[name]) for name in self.categories)

    @cached_property
    def _scales(self) -> tuple[tuple[float, float], ...]:
        return tuple(self.vocabulary.scales.get(name, (0.0, 1.0)) for name in self.numbers)

    def decode(self, rows: pa.RecordBatch) -> Usable:
        """Standardised numbers and numbered categories."""
        columns = [rows[name] for name in self.numbers]
        usable_N, reason = without_null(columns, self.numbers, rows.num_rows)
        # column by column, as they lie in Arrow: a batch is turned when it is made
        x_DN = np.empty((len(columns), rows.num_rows), dtype=np.float32)
        for column, scale, x_N in zip(columns, self._scales, x_DN, strict=True):
            _standardise(plain_numbers(column), *scale, out=x_N)
        known_KN = np.empty((len(self.categories), rows.num_rows), dtype=str(self.parts[-1].dtype).split(".")[1])
        for name, numbering, known_N in zip(self.categories, self._numberings, known_KN, strict=True):
            known_N[:] = numbering.of(rows[name])
        parts = (x_DN.T, known_KN.T) if self.categories else (x_DN.T,)
        if not usable_N.all():
            parts = tuple(part[usable_N] for part in parts)
        return Usable(parts, usable_N, reason)


def _standardise(values_N: np.ndarray, mean: float, std: float, *, out: np.ndarray) -> None:
    """In float64, rounded once."""
    with np.errstate(over="ignore"):  # beyond float32: infinite
        np.divide(np.subtract(values_N, mean, dtype=np.float64), std, out=out, casting="same_kind")
