"""Encoded images in a column of files of rows; `columns.shape` = [C, H, W], C = 1 for grey and 3 for colours."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from pipeline.rows.features import FeatureFormat
from pipeline.rows.pictures import MODES, Pictures
from pipeline.sources.base import FileSource, Options


class ImageOptions(Options):
    """What images take besides."""

    resize: bool = Field(default=False, description="bring images of another size to H × W; else they are unreadable")


class Images(FileSource):
    """Rows as x (N, C, H, W) from 0 to 1."""

    name: ClassVar[str] = "images"
    parameters: ClassVar[type[Options]] = ImageOptions
    options: ImageOptions

    def features(self) -> FeatureFormat:
        """One column of images."""
        columns = self.spec.columns
        if not isinstance(columns.features, str):
            raise self.refusal("columns.features", "expected the name of one column of images")
        if columns.shape is None or len(columns.shape) != 3 or columns.shape[0] not in MODES:
            raise self.refusal("columns.shape", "expected channels (1 or 3), height and width, [3, 32, 32] say")
        return Pictures(columns.features, columns.shape, self.options.resize)


SOURCE = Images
