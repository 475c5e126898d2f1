"""Tables in Parquet or Arrow files: columns of numbers (`columns.features`) and of categories (`options.categories`).

What the values of a category are, and mean and spread of the numbers, is counted in one pass over the readable rows to
train on when a job is first resolved, and stored beside the data's name: a value that these do not hold is *unknown*,
number 0. A row without one of its numbers is unreadable, unless `options.fill` says what stands for it.
"""

from __future__ import annotations

from functools import cached_property
from math import isfinite
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from pipeline.errors import nearest
from pipeline.rows.features import FeatureFormat
from pipeline.rows.table import Table
from pipeline.rows.tally import Vocabulary, frequent, stored, tallied
from pipeline.sources.base import FileSource, Options

_FILL = (
    'what stands for a null or NaN: a number in its column\'s unit, or "mean", that of training rows; default: a row '
    "with a null is unreadable"
)


class TabularOptions(Options):
    """What a table takes besides."""

    categories: tuple[str, ...] = Field(default=(), description="columns of categories: strings or integers")
    min_count: int = Field(default=1, ge=1, description="training rows that a value must occur in to be known")
    max_values: int = Field(default=1_000_000, ge=1, description="known values of a column at most: the most frequent")
    standardise: bool = Field(default=True, description="numbers to mean 0 and standard deviation 1 of training rows")
    fill: float | Literal["mean"] | None = Field(default=None, description=_FILL)
    flagged: tuple[str, ...] = Field(default=(), description="of these columns one number more: 1 where filled, else 0")

    @field_validator("fill", mode="before")
    @classmethod
    def _is_number_or_mean(cls, given: Any) -> Any:
        is_number = type(given) in (int, float) and isfinite(given)
        if not (is_number or given in ("mean", None)):
            raise PydanticCustomError("misfit", 'a number, or "mean"')
        return given


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
        self._refuse_unfit_flags()
        options, known = self.options, self._vocabulary
        fills = None if options.fill is None else tuple(self._fill(name) for name in self._numbers)
        scaled = known if options.standardise else Vocabulary(known.values, {})
        return Table(self._numbers, options.categories, scaled, fills, options.flagged)

    def _fill(self, column: str) -> float:
        """What stands for a missing number of a column, in its own unit."""
        given = self.options.fill
        return self._vocabulary.scales[column][0] if given == "mean" else float(given or 0)

    def _refuse_unfit_flags(self) -> None:
        flagged = self.options.flagged
        if flagged and self.options.fill is None:
            raise self.refusal("options.flagged", "nothing is filled; expected options.fill as well")
        for place, name in enumerate(flagged):
            if name not in self._numbers:
                known = nearest(name, self._numbers)
                raise self.refusal(f"options.flagged = {name!r}", f"no column of numbers of that name; {known}")
            if name in flagged[:place]:
                raise self.refusal("options.flagged", f"{name!r} is there twice")

    @property
    def _numbers(self) -> tuple[str, ...]:
        numbers = self.spec.columns.features
        if isinstance(numbers, str) or self.spec.columns.shape is not None:
            key = "features" if isinstance(numbers, str) else "shape"
            raise self.refusal(f"columns.{key}", "a table has an array of names of columns of numbers as its features")
        categories = self.options.categories
        if not numbers and not categories:
            raise self.refusal("options.categories", "missing, as are columns.features; expected names of columns")
        self._refuse_unfit_categories(numbers)
        return numbers

    def _refuse_unfit_categories(self, numbers: tuple[str, ...]) -> None:
        for place, name in enumerate(self.options.categories):
            others = {"columns.features": numbers, "options.categories": self.options.categories[:place]}
            taken = [key for key, names in others.items() if name in names]
            taken += ["columns.label"] if name == self.spec.columns.label else []
            if taken:
                raise self.refusal(f"options.categories[{place}] = {name!r}", f"that column is in {taken[0]} already")

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        # what stands for a missing number does not matter, but that something does: rows with one are readable then
        fills = None if self.options.fill is None else (0.0,) * len(self._numbers)
        raw = Table(self._numbers, self.options.categories, Vocabulary({}, {}), fills)
        counted = self.options.model_dump(mode="json", exclude={"fill", "flagged"})
        made_of = [self.training_identity, raw.columns, counted, fills is not None, self._needs_means]
        found = stored(self.store, made_of, lambda: self._tallied(raw))
        return Vocabulary({name: found.values[name] for name in self.options.categories}, found.scales)

    @property
    def _needs_means(self) -> bool:
        """Whether moments are counted though nothing is brought to one scale."""
        return self.options.fill == "mean" and not self.options.standardise

    def _tallied(self, raw: Table) -> Vocabulary:
        readable = (raw.readable(part) for part in self.training_rows(raw))
        rows = ({name: part[name] for name in raw.columns} for part in readable)
        tally = tallied(rows, raw.categories, raw.numbers if self.options.standardise or self._needs_means else ())
        least, most = self.options.min_count, self.options.max_values
        values = {name: frequent(counts, least=least, most=most) for name, counts in tally.counts.items()}
        return Vocabulary(values, {name: (one.mean, one.std) for name, one in tally.moments.items()})


SOURCE = Tabular
