"""The left operands of a template's products by the native kernel, where it is in force: see cpp/deviations.h.

Layer 1: torch and ctypes. Two looks at a slice, the second from the caches, instead of one for every operation.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch

from pipeline.kernels.native_sums import library_in_force

_I, _P = ctypes.c_int64, ctypes.c_void_p


class Slice(ctypes.Structure):
    """A slice of some units, and where what follows from it goes."""

    _fields_ = [
        *((name, _P) for name in ("z", "a", "rest", "fired")),
        *((name, _I) for name in ("entries", "positions", "units")),
        *((name, _I * 3) for name in ("z_step", "a_step", "to_step")),
        *((name, _P) for name in ("about_U", "rest_U", "square_U", "fired_U")),
    ]


class Deviations(NamedTuple):
    """What was subtracted from a, float32; Σ(a − about), Σ(a − about)² and how often z > 0, float64."""

    about_Gu: torch.Tensor
    rest_Gu: torch.Tensor
    square_Gu: torch.Tensor
    fired_Gu: torch.Tensor


def takes(*values: torch.Tensor) -> bool:
    """Whether there is a kernel, and it reads these."""
    return library_in_force() is not None and all(
        one.device.type == "cpu" and one.dtype == torch.float32 for one in values
    )


def deviations(
    z_GuLS: torch.Tensor | None, a_GuLS: torch.Tensor, rest_GuLS: torch.Tensor, fired_GuLS: torch.Tensor | None
) -> Deviations | None:
    """Write a less its mean, and whether z > 0 less how often, to memory of one layout; None where z is not finite.

    Without a z it is a's own.
    """
    library = library_in_force()
    assert library is not None
    groups, units, entries, positions = a_GuLS.shape
    doubles_3Gu = torch.empty((3, groups, units), dtype=torch.float64)
    fires_Gu = torch.empty((groups, units), dtype=torch.float64)
    found = Deviations(torch.empty((groups, units)), doubles_3Gu[0], doubles_3Gu[1], fires_Gu)
    for group in range(groups):
        a_uLS, rest_uLS = a_GuLS[group], rest_GuLS[group]
        z_uLS = a_uLS if z_GuLS is None else z_GuLS[group]
        piece = Slice(
            z=None if z_GuLS is None else z_uLS.data_ptr(), a=a_uLS.data_ptr(), rest=rest_uLS.data_ptr(),
            fired=None if fired_GuLS is None else fired_GuLS[group].data_ptr(),
            entries=entries, positions=positions, units=units,
            z_step=_steps(z_uLS), a_step=_steps(a_uLS), to_step=_steps(rest_uLS),
            about_U=found.about_Gu[group].data_ptr(), rest_U=found.rest_Gu[group].data_ptr(),
            square_U=found.square_Gu[group].data_ptr(), fired_U=found.fired_Gu[group].data_ptr(),
        )  # fmt: skip
        if library.deviations(ctypes.byref(piece)):
            return None
    return found


def _steps(value_uLS: torch.Tensor) -> ctypes.Array[ctypes.c_int64]:
    unit, entry, position = value_uLS.stride()
    return (_I * 3)(entry, position, unit)
