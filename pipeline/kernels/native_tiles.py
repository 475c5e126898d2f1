"""What the native kernel is told of a template's products on a processor's matrix unit: see cpp/tiled.h.

Layer 1: torch and ctypes.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from pipeline.kernels.native_sums import library_in_force

_I, _P = ctypes.c_int64, ctypes.c_void_p

# presentations that are summed at once
DEEP = 32
# bfloat16 numbers that make one of float32
PIECES = 3


class LeftTiles(ctypes.Structure):
    """a of some units, and where its tiles go."""

    _fields_ = [
        *((name, _P) for name in ("z", "a")),
        *((name, _I) for name in ("entries", "positions", "units")),
        *((name, _I * 3) for name in ("z_step", "a_step")),
        *((name, _P) for name in ("rest", "fired", "about_U", "rest_U", "square_U", "fired_U", "rate_U")),
    ]


class RightTiles(ctypes.Structure):
    """x of a group, and where its tiles go."""

    _fields_ = [
        ("x", _P),
        *((name, _I) for name in ("entries", "pixels", "channels", "places")),
        ("step", _I * 3),
        *((name, _P) for name in ("place_P", "pad_A", "about_C", "rest", "sum_AC", "square_A")),
    ]


class TileTaps(ctypes.Structure):
    """What is known of each place, and where the sums over the windows go."""

    _fields_ = [
        *((name, _P) for name in ("place_S", "place_K")),
        *((name, _I) for name in ("positions", "taps", "channels")),
        *((name, _P) for name in ("sum_AC", "square_A", "sum_KC", "square")),
    ]


class TileProducts(ctypes.Structure):
    """Both sides' tiles, and the matrix that their products are added to."""

    _fields_ = [
        *((name, _P) for name in ("left", "right")),
        *((name, _I) for name in ("pieces", "steps", "units", "channels", "taps")),
        *((name, _P) for name in ("place_T", "place_K", "product_UKC")),
    ]


STRUCTURES = (LeftTiles, RightTiles, TileTaps, TileProducts)


def kernel() -> ctypes.CDLL | None:
    """The native kernel, if it is in force and the processor has a matrix unit."""
    found = library_in_force()
    return found if found is not None and _has_tiles(found) else None


@cache
def _has_tiles(found: ctypes.CDLL) -> bool:
    return bool(found.tiles())


@cache
def _step_bytes(found: ctypes.CDLL, n: int, pieces: int) -> int:
    return int(found.tile_step_bytes(n, pieces))


def step_bytes(n: int, pieces: int = PIECES) -> int:
    """Bytes of the tiles of n units, or inputs, at one step of 32 presentations."""
    found = library_in_force()
    assert found is not None
    return _step_bytes(found, n, pieces)


def steps(value: torch.Tensor) -> ctypes.Array[ctypes.c_int64]:
    """The strides of a tensor of three axes."""
    return (_I * 3)(*value.stride())
