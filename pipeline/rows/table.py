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

    A null number makes its row unusable; a null category is unknown, as is one that training has not seen. With
    `fills`, one for each of the `numbers`, that value stands for a null or NaN, and behind the numbers there is one
    more for each of the `flagged` ones: 1 where it was filled, else 0.
    """

    numbers: tuple[str, ...]
    categories: tuple[str, ...]
    vocabulary: Vocabulary
    fills: tuple[float, ...] | None = None
    flagged: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """One number of each column, and one for each flag."""
        return (len(self.numbers) + len(self.flagged),)

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
        filled = {} if self.fills is None else {"fills": self.fills, "flagged": self.flagged}
        return {"numbers": self.numbers, "categories": self.categories, "values": known, "scales": scales} | filled

    @property
    def names(self) -> Names:
        """The columns', and the values that training has seen."""
        values = tuple((UNSEEN, *self.vocabulary.values[name]) for name in self.categories)
        features = (*self.numbers, *(f"{name} is null" for name in self.flagged))
        return Names(features=features, fields=self.categories, values=values)

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
        usable_N, reason = self._usable(rows)
        # column by column, as they lie in Arrow: a batch is turned when it is made
        x_DN = np.empty((*self.shape, rows.num_rows), dtype=np.float32)
        for name, scale, x_N in zip(self.numbers, self._scales, x_DN, strict=False):
            _standardise(plain_numbers(rows[name]), *scale, out=x_N)
        if self.fills is not None:
            self._fill(x_DN, self.fills)
        known_KN = np.empty((len(self.categories), rows.num_rows), dtype=str(self.parts[-1].dtype).split(".")[1])
        for name, numbering, known_N in zip(self.categories, self._numberings, known_KN, strict=True):
            known_N[:] = numbering.of(rows[name])
        parts = (x_DN.T, known_KN.T) if self.categories else (x_DN.T,)
        if not usable_N.all():
            parts = tuple(part[usable_N] for part in parts)
        return Usable(parts, usable_N, reason)

    def readable(self, rows: pa.RecordBatch) -> pa.RecordBatch:
        """Those of the rows that are usable, as they are."""
        usable_N, _ = self._usable(rows)
        return rows if usable_N.all() else rows.filter(pa.array(usable_N))

    def _usable(self, rows: pa.RecordBatch) -> tuple[np.ndarray, str]:
        """Which rows have every number that they need, and why the first other one cannot be used."""
        if self.fills is not None:
            return np.ones(rows.num_rows, dtype=bool), ""
        usable_N, reason = without_null([rows[name] for name in self.numbers], self.numbers, rows.num_rows)
        return usable_N, reason and f"{reason}, and options.fill is not set"

    def _fill(self, x_DN: np.ndarray, fills: tuple[float, ...]) -> None:
        """Write into standardised numbers what stands for those that are missing, and the flags behind them."""
        numbers = len(self.numbers)
        missing_DN = np.isnan(x_DN[:numbers])
        for fill, (mean, std), missing_N, x_N in zip(fills, self._scales, missing_DN, x_DN, strict=False):
            x_N[missing_N] = (fill - mean) / std
        for flag, name in enumerate(self.flagged, numbers):
            x_DN[flag] = missing_DN[self.numbers.index(name)]


def _standardise(values_N: np.ndarray, mean: float, std: float, *, out: np.ndarray) -> None:
    """In float64, rounded once."""
    with np.errstate(over="ignore"):  # beyond float32: infinite
        np.divide(np.subtract(values_N, mean, dtype=np.float64), std, out=out, casting="same_kind")
