"""The native kernel as a library: compiled at first need, loaded once per process.

Layer 1: ctypes. What kernels/*.py defines by numbers, the C++ takes from here.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from pipeline import compiler
from pipeline.kernels import bins, matchbins, ranked
from pipeline.kernels.native_deviations import Slice
from pipeline.kernels.native_task import Task
from pipeline.kernels.native_tiles import STRUCTURES

CONSTANTS = {
    "KEPT": bins.KEPT,
    "BIN_BITS": bins.MANTISSA_BITS,
    "MATCH_SIDE": matchbins.SIDE,
    "MATCH_BITS": matchbins.MANTISSA_BITS,
    "MATCH_BELOW": matchbins.BELOW,
    "LEAST_OCTAVE": ranked.LEAST_OCTAVE,
    "LAST_OCTAVE": ranked.LAST_OCTAVE,
}


@cache
def kernel() -> ctypes.CDLL | str:
    """The compiled kernel, or why there is none."""
    try:
        capability = torch.backends.cpu.get_cpu_capability()
        loaded = compiler.loaded("kernels/cpp/kernel.cpp", constants=CONSTANTS, processor=capability)
    except compiler.CompilerError as error:
        return str(error)
    if loaded.task_bytes() != ctypes.sizeof(Task):
        return f"its task has {loaded.task_bytes()} bytes, expected {ctypes.sizeof(Task)}"
    if loaded.slice_bytes() != ctypes.sizeof(Slice):
        return f"its slice has {loaded.slice_bytes()} bytes, expected {ctypes.sizeof(Slice)}"
    expected = sum(ctypes.sizeof(one) for one in STRUCTURES)
    if loaded.tiles_bytes() != expected:
        return f"its tiles have {loaded.tiles_bytes()} bytes, expected {expected}"
    address, number = ctypes.c_void_p, ctypes.c_int64
    tiles = zip(
        (loaded.left_tiles, loaded.right_tiles, loaded.tile_taps, loaded.tile_products), STRUCTURES, strict=True
    )
    for function, structure in tiles:
        function.argtypes = [ctypes.POINTER(structure)]
    loaded.tile_step_bytes.argtypes, loaded.tile_step_bytes.restype = [number, number], number
    loaded.deviations.argtypes = [address]
    loaded.observe.argtypes = [address, number, number]
    loaded.cut.argtypes, loaded.cut.restype = [address, number, number, address], number
    loaded.vector_sums.argtypes, loaded.vector_sums.restype = [address, *[number] * 4, address], None
    loaded.norm_sums.argtypes, loaded.norm_sums.restype = [*[address] * 3, number, number, address], None
    loaded.window_sums.argtypes = [address]
    loaded.invert.argtypes, loaded.invert.restype = [*[address] * 4, number, ctypes.c_double], None
    loaded.norms.argtypes, loaded.norms.restype = [address, number, number, address, address], None
    return loaded
