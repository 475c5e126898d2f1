"""Time series in Parquet or Arrow files: a column of lists of steps, all of one length or ragged.

`columns.shape` = [C, T] says how many channels a step has and how many steps a row has at most. A step is a list of C
numbers; with one channel it may be a plain number.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from pipeline.rows.features import FeatureFormat
from pipeline.rows.series import Series as SeriesFormat
from pipeline.sources.base import FileSource, Options


class SeriesOptions(Options):
    """What series take besides."""

    ragged: bool = Field(default=False, description="rows may be shorter than T: they are filled up and masked")


class Series(FileSource):
    """Rows as x (N, C, T) and, where they are ragged, mask (N, T)."""

    name: ClassVar[str] = "series"
    parameters: ClassVar[type[Options]] = SeriesOptions
    options: SeriesOptions

    def features(self) -> FeatureFormat:
        """One column of lists of steps."""
        columns = self.spec.columns
        if not isinstance(columns.features, str):
            raise self.refusal("columns.features", "expected the name of one column of lists of steps")
        if columns.shape is None or len(columns.shape) != 2:
            raise self.refusal("columns.shape", "expected the channels and the steps of a row, shape = [12, 29] say")
        return SeriesFormat(columns.features, columns.shape, self.options.ragged)


SOURCE = Series
