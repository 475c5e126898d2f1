"""Whether the kernel for GPUs is there: Triton comes with the CUDA builds of torch and not with the others.

Layer 1. Only here is it decided whether the modules that import Triton may be imported.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

from pipeline.devices import GPU

# raised whenever the same presentations would give other bits
VERSION = 5


@cache
def lacking() -> str | None:
    """Why the kernel for GPUs is not there."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    try:
        import_module("pipeline.kernels.triton_kernel")
    except (ImportError, AttributeError) as error:
        return f"Triton cannot be used: {error}"
    return None


def kernel() -> ModuleType | str:
    """The module of the kernel, or why it cannot run here."""
    reason = lacking()
    if reason is not None:
        return reason
    module = import_module("pipeline.kernels.triton_kernel")
    interpreted = import_module("triton").knobs.runtime.interpret
    return module if interpreted or torch.cuda.is_available() else f"torch sees no {GPU} device"


def sums() -> ModuleType | None:
    """The module that sums over inputs on GPUs; None where the kernel cannot run."""
    return None if isinstance(kernel(), str) else import_module("pipeline.kernels.triton_sums")
