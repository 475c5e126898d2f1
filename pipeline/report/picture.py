"""A matrix of signed numbers as a small picture in a terminal: coloured half blocks, or shades of plain ASCII.

Layer 5: pure; imports nothing of the pipeline. Zero is always the middle of the scale and the largest |value| its end,
so that pictures compare by shape and sign; NaN is grey, in ASCII "?".
"""

from __future__ import annotations

import warnings

import numpy as np
from rich.color import Color
from rich.style import Style
from rich.text import Text

# ColorBrewer's RdBu (told apart by the colour-blind) at −1, −½, 0, ½, 1: blue is negative, red is positive
_ANCHORS = np.array([[33, 102, 172], [146, 197, 222], [247, 247, 247], [244, 165, 130], [178, 24, 43]], dtype=float)
_PLACES = np.linspace(-1.0, 1.0, len(_ANCHORS))
_UNDEFINED = (128, 128, 128)
# darker is larger: five steps on either side of zero
_POSITIVE = ".+*#@"
_NEGATIVE = ",-=oO"
# small matrices are magnified to about this many characters across
_MAGNIFIED = 16

COLOUR_LEGEND = "blue: negative, red: positive"
ASCII_LEGEND = f"negative {_NEGATIVE[::-1]} | {_POSITIVE} positive"


def picture(values_HW: np.ndarray, *, colour: bool, width: int, largest: float | None = None) -> list[Text]:
    """Draw a matrix in lines of at most `width` characters, magnified if small and averaged if large.

    `largest` is the |value| at the ends of the scale; without it that of the matrix.
    A character is about twice as high as wide: a half block is square, an ASCII pixel takes two characters.
    """
    room = width if colour else width - 2  # ASCII has a frame
    across = -(-values_HW.shape[1] // max(1, room))
    scaled = _scaled(_averaged(values_HW, across, across), largest)
    if colour:
        return _half_blocks(_magnified(scaled, min(room, _MAGNIFIED)))
    if 2 * scaled.shape[1] <= min(room, 2 * _MAGNIFIED):
        return _shades(scaled.repeat(2, axis=1))
    return _shades(_averaged(scaled, 2, 1))


def _averaged(values_HW: np.ndarray, down: int, across: int) -> np.ndarray:
    """Means over blocks; a block at the border is the mean of what there is."""
    height, width = values_HW.shape
    padding = ((0, -height % down), (0, -width % across))
    padded_HW = np.pad(np.asarray(values_HW, dtype=float), padding, constant_values=np.nan)
    blocks = padded_HW.reshape(padded_HW.shape[0] // down, down, padded_HW.shape[1] // across, across)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the mean of NaN alone is NaN, which is wanted
        means_HW: np.ndarray = np.nanmean(blocks, axis=(1, 3))
    return means_HW


def _scaled(values_HW: np.ndarray, largest: float | None) -> np.ndarray:
    """Values from −1 to 1; infinities are at the ends."""
    sizes = np.abs(values_HW[np.isfinite(values_HW)])
    scale = largest or float(sizes.max(initial=0.0)) or 1.0
    return np.clip(values_HW / scale, -1.0, 1.0)


def _magnified(values_HW: np.ndarray, width: int) -> np.ndarray:
    times = max(1, width // values_HW.shape[1])
    return values_HW.repeat(times, axis=0).repeat(times, axis=1)


def _colour(value: float) -> Color:
    if np.isnan(value):
        return Color.from_rgb(*_UNDEFINED)
    return Color.from_rgb(*(round(float(np.interp(value, _PLACES, _ANCHORS[:, channel]))) for channel in range(3)))


def _half_blocks(values_HW: np.ndarray) -> list[Text]:
    """Two rows of pixels in one line: the foreground is the upper one."""
    lines = []
    for top in range(0, values_HW.shape[0], 2):
        line = Text()
        for column in range(values_HW.shape[1]):
            pair = [_colour(value) for value in values_HW[top : top + 2, column]]
            line.append("▀", Style.from_color(*pair))
        lines.append(line)
    return lines


def _shades(values_HW: np.ndarray) -> list[Text]:
    return [Text(f"|{''.join(map(_shade, row))}|") for row in values_HW]


def _shade(value: float) -> str:
    if np.isnan(value):
        return "?"
    step = round(abs(value) * len(_POSITIVE))
    if step == 0:
        return " "
    return (_POSITIVE if value > 0 else _NEGATIVE)[step - 1]
