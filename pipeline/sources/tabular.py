"""Tables in Parquet or Arrow files: columns of numbers (`columns.features`) and of categories (`options.categories`).

What the values of a category are, and mean and spread of the numbers, is counted in one pass over the rows to train on
when a job is first resolved, and stored beside the data's name: a value that these do not hold is *unknown*, number 0.
"""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar

from pydantic import Field

from pipeline.rows.features import FeatureFormat
from pipeline.rows.table import Table
from pipeline.rows.tally import Vocabulary, frequent, stored, tallied
from pipeline.sources.base import FileSource, Options


class TabularOptions(Options):
    """What a table takes besides."""

    categories: tuple[str, ...] = Field(default=(), description="columns of categories: strings or integers")
    min_count: int = Field(default=1, ge=1, description="training rows that a value must occur in to be known")
    max_values: int = Field(default=1_000_000, ge=1, description="known values of a column at most: the most frequent")
    standardise: bool = Field(default=True, description="numbers to mean 0 and standard deviation 1 of training rows")


class Tabular(FileSource):
    """Rows as x (N, D) and category (N, K)."""

    name: ClassVar[str] = "tabular"
    parameters: ClassVar[type[Options]] = TabularOptions
    options: TabularOptions

    @property
    def categories(self) -> tuple[int, ...]:
        """Known values of each column, and one for all others."""
        return self._vocabulary.sizes

    def features(self) -> FeatureFormat:
        """Numbers and categories with the vocabulary of the rows to train on."""
        return Table(self._numbers, self.options.categories, self._vocabulary)

    @property
    def _numbers(self) -> tuple[str, ...]:
        numbers = self.spec.columns.features
        if isinstance(numbers, str) or self.spec.columns.shape is not None:
            key = "features" if isinstance(numbers, str) else "shape"
            raise self.refusal(f"columns.{key}", "a table has an array of names of columns of numbers as its features")
        if not numbers and not self.options.categories:
            raise self.refusal("options.categories", "missing, as are columns.features; expected names of columns")
        return numbers

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        raw = Table(self._numbers, self.options.categories, Vocabulary({}, {}))
        made_of = [self.training_identity, raw.columns, self.options.model_dump(mode="json")]
        found = stored(self.store, made_of, lambda: self._tallied(raw))
        return Vocabulary({name: found.values[name] for name in self.options.categories}, found.scales)

    def _tallied(self, raw: Table) -> Vocabulary:
        rows = ({name: part[name] for name in raw.columns} for part in self.training_rows(raw))
        tally = tallied(rows, raw.categories, raw.numbers if self.options.standardise else ())
        least, most = self.options.min_count, self.options.max_values
        values = {name: frequent(counts, least=least, most=most) for name, counts in tally.counts.items()}
        return Vocabulary(values, {name: (one.mean, one.std) for name, one in tally.moments.items()})


SOURCE = Tabular
