"""Σx, Σx² and Σ(x − x̄)² of the inputs of every presentation by the native kernel, where it is in force.

Layer 1: torch and ctypes. One pass over x in float64 instead of one for every operation; equal to the sums of
`flow.patches` to rounding. Like them, functions of each presentation alone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, lru_cache
from types import ModuleType
from typing import Any

import torch

from pipeline.input_forms import InputSums
from pipeline.kernels.native_task import TYPES, WindowAxis, Windows

_TYPES = {getattr(torch, name): number for name, number in TYPES.items()}
_library: ContextVar[ctypes.CDLL | None] = ContextVar("native kernel", default=None)
# the module that sums on GPUs
_on_gpus: ContextVar[Any] = ContextVar("kernel for GPUs", default=None)


@contextmanager
def in_force(library: ctypes.CDLL | None, on_gpus: ModuleType | None = None) -> Iterator[None]:
    """Sum by this library within the block, or on GPUs by this module; by torch if both are None."""
    tokens = _library.set(library), _on_gpus.set(on_gpus)
    try:
        yield
    finally:
        _library.reset(tokens[0])
        _on_gpus.reset(tokens[1])


def library_in_force() -> ctypes.CDLL | None:
    """The library that is in force here, if one is."""
    return _library.get()


def _takes(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in _TYPES


def of_vectors(x_LSGD: torch.Tensor) -> InputSums | None:
    """The sums of explicit inputs; None where they are not computed here."""
    library, on_gpus = _library.get(), _on_gpus.get()
    if on_gpus is not None:
        return on_gpus.of_vectors(x_LSGD)  # type: ignore[no-any-return]
    if library is None or not _takes(x_LSGD):
        return None
    shape, inputs = x_LSGD.shape[:3], x_LSGD.shape[3]
    x_VD = x_LSGD.reshape(-1, inputs)
    if inputs > 1 and x_VD.stride(1) != 1:
        x_VD = x_VD.contiguous()
    sums_3V = torch.empty((3, len(x_VD)), dtype=torch.float64)
    library.vector_sums(x_VD.data_ptr(), _TYPES[x_VD.dtype], len(x_VD), x_VD.stride(0), inputs, sums_3V.data_ptr())
    return _in_order(sums_3V, shape)


def _in_order(sums_3V: torch.Tensor, shape: Sequence[int]) -> InputSums:
    return InputSums(*sums_3V.view(3, *shape).unbind(0), laid_3P=sums_3V if shape[2] == 1 else None)


def of_norm(x_LSGD: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor) -> InputSums | None:
    """The sums of (x − mean) · scale, rounded as a layer norm rounds it; one mean and 1/std for each vector, in order.

    None where they are not computed here: the caller makes the norm's output then.
    """
    library = _library.get()
    if library is None or x_LSGD.dtype != torch.float32 or not x_LSGD.is_contiguous():
        return None
    shape, inputs = x_LSGD.shape[:3], x_LSGD.shape[3]
    if mean.numel() * inputs != x_LSGD.numel() or not _rounds_as_torch(library):
        return None
    return _of_norm(library, x_LSGD, mean, scale, shape)


def _of_norm(
    library: ctypes.CDLL, x: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor, shape: Sequence[int]
) -> InputSums:
    sums_3V = torch.empty((3, mean.numel()), dtype=torch.float64)
    pointers = x.data_ptr(), mean.data_ptr(), scale.data_ptr()
    library.norm_sums(*pointers, mean.numel(), x.shape[-1], sums_3V.data_ptr())
    return _in_order(sums_3V, shape)


@cache
def _rounds_as_torch(library: ctypes.CDLL) -> bool:
    """Whether this build of torch rounds a layer norm as the library does; asked once, of some vectors."""
    x_LSGD = torch.linspace(-3, 9, 7 * 1001).sin().view(7, 1, 1, 1001)
    made, mean, scale = torch.native_layer_norm(x_LSGD, (1001,), None, None, 1e-5)
    with in_force(library):
        expected = of_vectors(made)
    found = _of_norm(library, x_LSGD, mean, scale, x_LSGD.shape[:3])
    return expected is not None and all(
        torch.equal(one, other)
        for one, other in zip(
            (found.sum_LSG, found.square_LSG, found.centred_LSG),
            (expected.sum_LSG, expected.square_LSG, expected.centred_LSG),
            strict=True,
        )
    )


def of_windows(
    x: torch.Tensor,
    *,
    groups: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[tuple[int, int]],
) -> InputSums | None:
    """The sums over every window of a convolution of x (L, C, *spatial); None where they are not computed here."""
    library, on_gpus = _library.get(), _on_gpus.get()
    if on_gpus is not None:
        shape = {"kernel": kernel, "stride": stride, "dilation": dilation, "padding": padding}
        return on_gpus.of_windows(x, groups=groups, **shape)  # type: ignore[no-any-return]
    if library is None or not _takes(x):
        return None
    x = x.contiguous()
    axes, positions = _axes(x.shape[2:], tuple(kernel), tuple(stride), tuple(dilation), tuple(padding))
    sums_3LGS = torch.empty((3, len(x), groups, positions), dtype=torch.float64)
    sum_LGS, square_LGS, centred_LGS = sums_3LGS.unbind(0)
    windows = Windows(
        x=x.data_ptr(), type=_TYPES[x.dtype], entries=len(x), channels=x.shape[1], groups=groups,
        stride_entry=x.stride(0), axis=axes, sum_LGS=sum_LGS.data_ptr(), square_LGS=square_LGS.data_ptr(),
        centred_LGS=centred_LGS.data_ptr(),
    )  # fmt: skip
    if library.window_sums(ctypes.byref(windows)):
        raise MemoryError("no memory for the sums over a convolution's windows")
    if groups == 1:
        return _in_order(sums_3LGS.view(3, -1), (len(x), positions, 1))
    return InputSums(*sums_3LGS.transpose(2, 3).unbind(0))


@lru_cache(maxsize=256)
def _axes(
    sizes: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[tuple[int, int]],
) -> tuple[ctypes.Array[WindowAxis], int]:
    """The three axes of windows, of size 1 where they have fewer; how many windows there are."""
    axes, positions = [WindowAxis(1, 1, 1, 1, 0, 0, 1)] * (3 - len(kernel)), 1
    for size, taps, step, apart, (before, after) in zip(sizes, kernel, stride, dilation, padding, strict=True):
        out = (size + before + after - apart * (taps - 1) - 1) // step + 1
        axes.append(WindowAxis(size, taps, step, apart, before, after, out))
        positions *= out
    return (WindowAxis * 3)(*axes), positions
