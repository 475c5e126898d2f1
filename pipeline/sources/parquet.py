"""Rows of Parquet files at any URL: one column of lists, or several columns of numbers, with label, split and key."""

from __future__ import annotations

from typing import ClassVar

from pipeline.sources.base import FileSource


class Parquet(FileSource):
    """A file, every Parquet file below a directory, or what a glob matches."""

    name: ClassVar[str] = "parquet"


SOURCE = Parquet
