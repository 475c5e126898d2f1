"""Compiles the Triton kernels for a GPU without one, as batches would launch them, and counts what must not be in them.

`TRITON_INTERPRET=0 python -m tests.kernels.compiled [CAPABILITY [BATCH]]` prints a JSON line for each kernel and batch.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from pipeline.kernels import triton_kernel, triton_sums
from pipeline.kernels.triton_show import Cut
from tests.kernels.fused import laid_out, primitives_of
from tests.laws.drawn import Recipe, draw

# what decides which code is made: the type, the layout, what is given
BATCHES = {
    "convolution": (Recipe(1, rows=8, positions=49, units=16, dtype=torch.bfloat16), "entries, units, positions"),
    "everything given": (
        Recipe(2, rows=64, units=48, gate="gelu", masked=True, numbered=True, normed=True),
        "entries, positions, units",
    ),
    "dense": (Recipe(3, rows=64, units=32, groups=3, dtype=torch.float16), "entries, positions, units"),
    "one unit": (Recipe(4, rows=1, units=1, gate="identity"), "entries, positions, units"),
}


class Absent:
    """A driver that says what GPU there is, and has none."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        # compiled code is kept by device
        return self._target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def main(capabilities: list[int], batches: list[str]) -> None:
    launch = JITFunction.run

    def compiled(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        made = launch(kernel, *args, grid=grid, warmup=True, **kwargs)
        ptx = made.asm["ptx"]
        counts = {"contracted": ptx.count("fma.rn.f64"), "flushed": ptx.count(".ftz"), "cubin": len(made.asm["cubin"])}
        print(json.dumps({"batch": name, "kernel": made.name, "capability": capability, **counts}), flush=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", compiled)
        # nothing was launched: there is nothing to be known of rows
        patch.setattr(triton_kernel, "known_of", lambda *_: {})
        patch.setattr(triton_sums, "_takes", lambda x: True)
        for capability in capabilities:
            driver.set_active(Absent(capability))
            for name in batches:
                recipe, layout = BATCHES[name]
                shown = laid_out(draw(recipe), layout)
                kernel = triton_kernel.Triton(shown.site, triton_kernel.fused(primitives_of(shown.site)))
                kernel._pass(Cut(shown))
                triton_sums.of_vectors(torch.ones(2, 3, 1, 5, dtype=recipe.dtype))
                windows = {"kernel": (3, 3), "stride": (1, 1), "dilation": (1, 1), "padding": ((1, 1), (1, 1))}
                triton_sums.of_windows(torch.ones(2, 4, 6, 6, dtype=recipe.dtype), groups=2, **windows)


if __name__ == "__main__":
    main([int(one) for one in sys.argv[1:2]] or [80, 90], sys.argv[2:] or list(BATCHES))
