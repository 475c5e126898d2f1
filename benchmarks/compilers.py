"""What the native kernel costs as each compiler of this machine makes it, beside a loop in numba if that is here.

    python -m benchmarks.compilers

One site of 16 units shown 64 maps of 32 × 32, float32, on one thread. numba's loop does moments, extremes, counts and
raw bins, and leaves out what the native kernel does besides: windows of bins, NaN and infinities, rows.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.asked import parser
from benchmarks.machine import machine
from benchmarks.timing import interleaved, ratio
from pipeline import compiler
from pipeline.kernels import native_build
from pipeline.kernels.base import Primitive
from pipeline.kernels.bins import Bins
from pipeline.kernels.firing import Firing
from pipeline.kernels.moments import Moments
from pipeline.kernels.native import Native, fused
from pipeline.registry import statistics
from tests.laws.drawn import Recipe, draw

ROWS, POSITIONS, UNITS = 64, 1024, 16
FEW = (Moments("z", 4), Firing(), Bins())
SECONDS, ROUNDS = 20.0, 15


def main() -> None:
    torch.set_num_threads(1)
    shown = draw(Recipe(2, rows=ROWS, positions=POSITIONS, units=UNITS))
    # as a convolution gives it
    z_LSU = shown.z_LSU.transpose(1, 2).contiguous().transpose(1, 2)
    shown = replace(shown, z_LSU=z_LSU, a_LSU=z_LSU.relu())
    needed = [one for name in ("response", "labels", "exemplars", "match") for one in _needs(name, shown.site)]
    works: dict[str, Callable[[int], object]] = {}
    for command in compiler.compilers():
        library = _made_by(command)
        for what, primitives in (("moments + bins", FEW), ("four statistics", fused(list(dict.fromkeys(needed))))):
            kernel = Native(shown.site, primitives, library)
            named = Path(command[0]).name if len(command) == 1 else " ".join(command[2:])
            works[f"{named}, {what}"] = lambda _, kernel=kernel: kernel.add(shown)
    if find_spec("numba"):
        works["numba, moments + raw bins"] = _in_numba(z_LSU)
    passes = interleaved(works, seconds=SECONDS, rounds=ROUNDS)
    print(machine(1))
    for name, one in passes.items():
        least = min(one.cpu) / z_LSU.numel() * 1e9
        versus = ratio(one, passes[next(iter(works))])
        print(f"{name:32} {least:6.2f} ns per value of the processor's time, {versus.cpu:5.2f} x the first")


def _needs(name: str, site: object) -> list[Primitive]:
    return list(statistics()[name].primitives(site).values())


def _made_by(command: list[str]) -> ctypes.CDLL:
    """The kernel of one compiler, loaded from a folder that is gone at once."""
    with tempfile.TemporaryDirectory() as folder:
        before, cache = compiler.compilers, os.environ.get("XDG_CACHE_HOME")
        compiler.compilers, os.environ["XDG_CACHE_HOME"] = lambda: [command], folder
        try:
            library = native_build.kernel.__wrapped__()
        finally:
            compiler.compilers = before
            os.environ.pop("XDG_CACHE_HOME")
            os.environ |= {} if cache is None else {"XDG_CACHE_HOME": cache}
    if isinstance(library, str):
        raise SystemExit(library)
    return library


def _in_numba(z_LSU: torch.Tensor) -> Callable[[int], object]:
    import numba
    import numpy as np

    @numba.njit(nogil=True, error_model="numpy")
    def observe(z_LUS, bits_LUS, raw_UB, sums_U5, extremes_U2, count_U3):  # type: ignore[no-untyped-def]
        for u in range(z_LUS.shape[1]):
            for e in range(z_LUS.shape[0]):
                z_S, bits_S = z_LUS[e, u], bits_LUS[e, u]
                centre = sums_U5[u, 0] if count_U3[u, 0] else np.float64(z_S[0])
                absolute, s1, s2, s3, s4 = 0.0, 0.0, 0.0, 0.0, 0.0
                low, high, zero, fired = z_S[0], z_S[0], 0, 0
                for s in range(len(z_S)):
                    rest = np.float64(z_S[s]) - centre
                    square = rest * rest
                    s1 += rest
                    s2 += square
                    s3 += square * rest
                    s4 += square * square
                    absolute += abs(np.float64(z_S[s]))
                    low, high = min(low, z_S[s]), max(high, z_S[s])
                    zero += z_S[s] == 0
                    fired += z_S[s] > 0
                for s in range(len(z_S)):
                    raw_UB[u, bits_S[s] >> np.uint32(21)] += np.uint32(1)
                n, before = len(z_S), count_U3[u, 0]
                mean = s1 / n
                step, total = centre + mean - sums_U5[u, 0], before + n
                m2, m3 = s2 - s1 * mean, s3 - 3 * mean * s2 + 2 * n * mean**3
                m4 = s4 - 4 * mean * s3 + 6 * mean * mean * s2 - 3 * n * mean**4
                f, g = before / total, n / total
                if before == 0:
                    step = 0.0
                    sums_U5[u, 0] = centre + mean
                sums_U5[u, 3] += m4 + step**4 * total * f * g * (f * f - f * g + g * g)
                sums_U5[u, 3] += 6 * step**2 * (f * f * m2 + g * g * sums_U5[u, 1])
                sums_U5[u, 3] += 4 * step * (f * m3 - g * sums_U5[u, 2])
                sums_U5[u, 2] += m3 + step**3 * total * f * g * (f - g) + 3 * step * (f * m2 - g * sums_U5[u, 1])
                sums_U5[u, 1] += m2 + step * step * total * f * g
                sums_U5[u, 0] += step * g
                sums_U5[u, 4] += absolute
                extremes_U2[u, 0], extremes_U2[u, 1] = min(extremes_U2[u, 0], low), max(extremes_U2[u, 1], high)
                count_U3[u, 0] += n
                count_U3[u, 1] += zero
                count_U3[u, 2] += fired

    z_LUS = np.ascontiguousarray(z_LSU.transpose(1, 2).numpy())
    state = np.zeros((UNITS, 2048), np.uint32), np.zeros((UNITS, 5)), np.zeros((UNITS, 2)), np.zeros((UNITS, 3), int)
    bits_LUS = z_LUS.view(np.uint32)
    observe(z_LUS, bits_LUS, *state)
    variance = z_LUS.astype(float).var((0, 2))
    assert np.allclose(state[1][:, 1] / state[2 + 1][:, 0], variance)
    return lambda _: observe(z_LUS, bits_LUS, *state)


if __name__ == "__main__":
    parser("compilers", __doc__, takes="two minutes").parse_args()
    main()
