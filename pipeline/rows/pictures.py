"""Encoded images (PNG, JPEG, …) as numbers from 0 to 1: of 8 bits to a channel, or grey of 16.

Layer 1: no I/O.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pyarrow import types

from pipeline.errors import JobError
from pipeline.rows.features import FeatureFormat, Part, Role, Usable

MODES = {1: "L", 3: "RGB"}
GREATEST = 255
# Pillow's name of numbers
DEEP = "F"
DEEP_GREATEST = 65535
# raised whenever the same bytes would give other numbers
PICTURES_VERSION = 2


class NoPicture(Exception):  # noqa: N818
    """What is no image, or none of the shape: the message says why."""


@dataclass(frozen=True)
class Pictures(FeatureFormat):
    """A column of encoded images as (C, H, W), grey or RGB as C says; of another size only if `resize`, bilinearly.

    The column holds bytes, or structs with a field "bytes", as Hugging Face's data sets do.
    """

    column: str
    shape: tuple[int, ...]
    resize: bool

    @property
    def columns(self) -> tuple[str, ...]:
        """The column of images."""
        return (self.column,)

    @property
    def parts(self) -> tuple[Part, ...]:
        """One tensor of float32."""
        return (Part(self.shape, torch.float32),)

    @property
    def identity(self) -> dict[str, Any]:
        """Its fields, and how they are read."""
        return {"pictures": asdict(self), "version": PICTURES_VERSION}

    def roles(self) -> Iterator[Role]:
        """Bytes."""
        yield Role(self.column, "bytes of an image each", lambda kind: _is_bytes(kind) or _holds_bytes(kind))

    def decode(self, rows: pa.RecordBatch) -> Usable:
        """Decode each; what is no image is not usable."""
        column = rows[self.column]
        if types.is_struct(column.type):
            column = column.field("bytes")
        return self.decode_all(column.to_pylist())

    def decode_all(self, contents: Sequence[bytes | None]) -> Usable:
        """Decode the bytes of each image; None is not usable."""
        usable_N = np.ones(len(contents), dtype=bool)
        images, reason = [np.zeros((0, *self.shape), dtype=np.float32)], ""
        for row, content in enumerate(contents):
            try:
                images.append(self._image(content)[None])
            except NoPicture as error:
                usable_N[row], reason = False, reason or str(error)
        return Usable((np.concatenate(images),), usable_N, reason)

    def _image(self, content: bytes | None) -> np.ndarray:
        if content is None:
            raise NoPicture("the image is null")
        image_module = _pillow()
        channels, height, width = self.shape
        try:
            with image_module.open(io.BytesIO(content)) as opened:
                image = _of_mode(opened, MODES[channels])
        except (OSError, SyntaxError, ValueError, image_module.DecompressionBombError) as error:
            raise NoPicture(f"no image can be decoded: {str(error).partition(' <')[0]}") from error
        if image.size != (width, height):
            if not self.resize:
                found = f"{image.size[1]} × {image.size[0]}"
                raise NoPicture(f"the image has {found} pixels, expected {height} × {width}")
            image = image.resize((width, height), image_module.Resampling.BILINEAR)
        greatest = DEEP_GREATEST if image.mode == DEEP else GREATEST
        pixel_HWC = np.asarray(image, dtype=np.float32).reshape(height, width, -1) / np.float32(greatest)
        return np.moveaxis(np.broadcast_to(pixel_HWC, (height, width, channels)), 2, 0)


def _of_mode(opened: Any, mode: str) -> Any:
    """The image with 8 bits to a channel; a grey one of 16 as numbers, which Pillow would cut off at 255."""
    if opened.mode.startswith("I;16") or (opened.mode == "I" and opened.format == "PPM"):
        return opened.convert(DEEP)
    if opened.mode in ("I", DEEP):
        raise NoPicture("its pixels are 32 bits deep, which have no known greatest: expected 8, or 16 of grey")
    return opened.convert(mode)


def _pillow() -> Any:
    try:
        from PIL import Image  # an optional dependency
    except ImportError as error:
        raise JobError("images need Pillow: pip install 'neuron-census[images]'") from error
    return Image


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _holds_bytes(kind: pa.DataType) -> bool:
    return bool(types.is_struct(kind)) and kind.get_field_index("bytes") >= 0 and _is_bytes(kind.field("bytes").type)
