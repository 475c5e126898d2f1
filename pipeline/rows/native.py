"""What writes rows into a batch's memory, as a library: compiled at first need, loaded once per process.

Layer 1: ctypes, which lets other threads run meanwhile. Whoever calls it can do without, and gets the same bytes.
"""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np
import torch

from pipeline import compiler


@cache
def library() -> ctypes.CDLL | None:
    """The compiled library, or None where nothing compiles it."""
    try:
        capability = torch.backends.cpu.get_cpu_capability()
        loaded = compiler.loaded("rows/cpp/padding.cpp", constants={}, processor=capability)
    except compiler.CompilerError:
        return None
    address, number = ctypes.c_void_p, ctypes.c_int64
    loaded.pad.argtypes, loaded.pad.restype = [*[address] * 3, *[number] * 3, address], None
    loaded.first_positions.argtypes, loaded.first_positions.restype = [address, *[number] * 3, address], None
    return loaded


def address(array: np.ndarray) -> int:
    """Where the numbers of a contiguous array lie."""
    place: int = array.__array_interface__["data"][0]
    return place
