"""The native kernel made by every compiler, for every processor down to those without wide vectors: the same bits.

CI runs one compiler and small batches; the slow test all compilers and large ones.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pytest
import torch

from pipeline import compiler
from pipeline.kernels import native_build, native_deviations, native_sums
from pipeline.kernels.native import Native, fused
from pipeline.sites import Presentations
from tests.kernels.fused import LAYOUTS, PANELS, laid_out, primitives_of, without_matches
from tests.kernels.test_fused import LARGE
from tests.laws.drawn import Recipe, draw

SMALL = {
    "positions": Recipe(1, rows=5, positions=70, units=9),
    "rows": Recipe(2, rows=150, units=19, gate="gelu"),
    "groups": Recipe(3, rows=9, positions=5, units=24, groups=3, gate="identity", masked=True),
    "panels": PANELS["short panels"],
}
# units side by side, and positions
ORDERS = ((0, 2, 3, 1), (0, 1, 2, 3))


def widths() -> list[str]:
    """What torch calls processors that have no wider vectors than this one."""
    known = ["DEFAULT", *compiler.PROCESSORS]
    return known[: known.index(torch.backends.cpu.get_cpu_capability()) + 1]


def made(command: list[str], width: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """The library that a compiler makes for a processor."""
    with monkeypatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setattr(compiler, "compilers", lambda: [command])
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: width)
        library = native_build.kernel.__wrapped__()
    assert isinstance(library, ctypes.CDLL), library
    return library


def results(library: ctypes.CDLL, shown: Sequence[Presentations]) -> list[bytes]:
    """Every state of the batches, and a template's left operands of some numbers, as they lie in memory."""
    found = []
    for one in shown:
        needed = fused(primitives_of(one.site))
        # without matches some are read in panels
        for asked in (needed, without_matches(needed)):
            kernel = Native(one.site, asked, library)
            kernel.add(one)
            found += [value for state in kernel.states().values() for value in state.values()]
    generator = torch.Generator().manual_seed(0)
    with native_sums.in_force(library):
        for units, order in product((1, 43), ORDERS):
            # its inverse puts the axes back
            back = [order.index(axis) for axis in range(4)]
            numbers = torch.randn((4, 2, units, 3, 21), generator=generator).unbind(0)
            z, a, rest, fired = (one.permute(order).contiguous().permute(back) for one in numbers)
            sums = native_deviations.deviations(z, a + 3, rest, fired)
            assert sums is not None
            found += [rest.contiguous(), fired.contiguous(), *sums]
    return [value.numpy().tobytes() for value in found]


def test_narrow_vectors_give_the_bits_of_wide_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shown = [laid_out(draw(recipe), layout) for recipe in SMALL.values() for layout in sorted(LAYOUTS)]
    command, *_ = compiler.compilers()
    wide, *others = (results(made(command, width, tmp_path, monkeypatch), shown) for width in reversed(widths()))
    assert others
    assert all(narrow == wide for narrow in others)


@pytest.mark.parametrize(
    ("flags", "processor"),
    # without the headers of a C library, as on a machine that has no compiler of its own
    [(["-nostdlibinc"], "AVX512"), (["-nostdlibinc"], "AVX2"), (["-target", "aarch64-linux-gnu"], "DEFAULT")],
)
def test_it_compiles_on_a_bare_machine_and_for_arm(
    flags: list[str], processor: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    zig = [sys.executable, "-m", compiler.ZIG, "cc", *flags]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiler, "compilers", lambda: [zig])
    assert compiler.compiled("kernels/cpp/kernel.cpp", constants=native_build.CONSTANTS, processor=processor)


@pytest.mark.slow
def test_every_compiler_and_width_of_vectors_gives_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shown = [laid_out(draw(LARGE[kind]), layout) for kind in sorted(LARGE) for layout in sorted(LAYOUTS)]
    found = [
        results(made(command, width, tmp_path / str(number), monkeypatch), shown)
        for number, (command, width) in enumerate(product(compiler.compilers(), widths()))
    ]
    assert len(found) > 1
    assert all(one == found[0] for one in found)
