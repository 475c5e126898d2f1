"""Rows of Parquet or Arrow files at any URL: a column of lists, or several of numbers, with label, split and key."""

from __future__ import annotations

from typing import ClassVar

from pipeline.sources.base import FileSource


class Parquet(FileSource):
    """A file, every Parquet and Arrow file below a directory, or what a glob matches."""

    name: ClassVar[str] = "parquet"


SOURCE = Parquet
