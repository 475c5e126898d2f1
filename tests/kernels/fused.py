"""What fused kernels are compared with the reference on, and how: batches of any kind and layout, state by state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from hypothesis import strategies as st

from pipeline.kernels.accumulate import Accumulator, Reference
from pipeline.kernels.base import Primitive, State
from pipeline.kernels.matchbins import MatchBins
from pipeline.kernels.ranked import Ranked
from pipeline.registry import statistics
from pipeline.sites import Presentations, Site
from tests.laws.drawn import Recipe

FUSED = ("response", "labels", "exemplars", "match")
# state tensors of floats that are chosen, not summed
EXACT = {"min", "max"}
INFINITE = (np.nan, np.inf, -np.inf)

recipes = st.builds(
    Recipe,
    seed=st.integers(0, 2**32),
    rows=st.integers(0, 40),
    positions=st.sampled_from([1, 2, 7, 33]),
    units=st.sampled_from([1, 3, 8, 19]),
    fan_in=st.sampled_from([1, 2, 5]),
    groups=st.integers(1, 3),
    gate=st.sampled_from(["identity", "relu", "gelu", "sigmoid"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([1.0, 1e-30, 1e4]),
    shift=st.sampled_from([0.0, 1e4]),
    spread=st.booleans(),
    masked=st.booleans(),
    numbered=st.booleans(),
    labelled=st.booleans(),
    normed=st.booleans(),
    repeated=st.booleans(),
    constant=st.booleans(),
    tied=st.booleans(),
    flat=st.booleans(),
    unbiased=st.booleans(),
    bad=st.sampled_from([(), INFINITE, (0.0, -0.0, 1e-42, -1e-42), (np.nan,)]),
)
LAYOUTS = {
    "entries, positions, units": lambda value: value.contiguous(),
    "entries, units, positions": lambda value: value.transpose(1, 2).contiguous().transpose(1, 2),
    "units, entries, positions": lambda value: value.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "part of something larger": lambda value: torch.cat([value, value], 2)[..., 1:].unflatten(0, (-1, 1)).expand(
        -1, 2, -1, -1
    )[:, 1, :, : value.shape[2]].roll(1, 2),
}  # fmt: skip


# with rows long enough, and units by eights, to be read in panels where presentations lie one behind the other and no
# more is asked of matches than each row's best; the last ones may not
PANELS = {
    "short panels": Recipe(11, rows=9, positions=100, units=24, gate="gelu", repeated=True),
    "runs of several rows": Recipe(12, rows=21, positions=128, units=136, gate="relu"),
    "runs of one row": Recipe(13, rows=3, positions=1024, units=8, gate="identity", normed=True, constant=True),
    "nothing finite": Recipe(14, rows=7, positions=70, units=40, gate="sigmoid", bad=INFINITE),
    "small and zero": Recipe(15, rows=6, positions=64, units=16, gate="gelu", bad=(0.0, -0.0, 1e-42, -1e-42)),
    "far from 0": Recipe(16, rows=5, positions=90, units=32, gate="relu", shift=1e4),
    "units of several groups": Recipe(17, rows=6, positions=64, units=16, groups=2, gate="gelu"),
    "units that are no eights": Recipe(18, rows=6, positions=64, units=13, gate="gelu"),
    "rows too long": Recipe(19, rows=3, positions=1100, units=16, gate="gelu"),
}


def without_matches(primitives: Sequence[Primitive], *, ranked: bool = True) -> list[Primitive]:
    """Those beside the bins of matches; if not `ranked`, beside the rows that match best as well."""
    some = [one for one in primitives if not isinstance(one, MatchBins)]
    return [one for one in some if ranked or not isinstance(one, Ranked) or one.kind != "match"]


def primitives_of(site: Site) -> list[Primitive]:
    needed = [one for name in FUSED for one in statistics()[name].primitives(site).values()]
    return list(dict.fromkeys(needed))


def grown_by_both(
    ours: Accumulator, needed: Sequence[Primitive], pieces: Sequence[Presentations]
) -> Iterator[tuple[Primitive, State, State]]:
    """The states of pieces that come one after the other, grown by a kernel and by the reference."""
    theirs = Reference(pieces[0].site, needed)
    for piece in pieces:
        ours.add(piece)
        theirs.add(piece)
    mine, yours = ours.states(), theirs.states()
    for one in needed:
        yield one, mine[one], yours[one]


def laid_out(shown: Presentations, layout: str) -> Presentations:
    arrange = LAYOUTS[layout]
    z_LSU = arrange(shown.z_LSU)
    a_LSU = z_LSU if shown.a_LSU is shown.z_LSU else arrange(shown.a_LSU)
    affine_LSU = None if shown.affine_LSU is None else arrange(shown.affine_LSU)
    assert torch.equal(z_LSU.nan_to_num(7), shown.z_LSU.nan_to_num(7))
    return replace(shown, z_LSU=z_LSU, a_LSU=a_LSU, affine_LSU=affine_LSU)


def assert_same(ours: State, theirs: State, primitive: Primitive) -> None:
    assert ours.keys() == theirs.keys()
    for name, mine in ours.items():
        yours = theirs[name]
        assert (mine.shape, mine.dtype) == (yours.shape, yours.dtype), f"{primitive} {name}"
        same = (mine == yours) | (mine.isnan() & yours.isnan()) if mine.is_floating_point() else mine == yours
        if mine.is_floating_point() and name not in EXACT and not isinstance(primitive, Ranked):
            same |= (mine - yours).abs() <= allowed(name, theirs)
        if name in EXACT:
            same &= (mine != 0) | ~(mine.signbit() | yours.signbit())
        assert same.all(), f"{primitive} {name}: {mine[~same]} is not {yours[~same]}"


def allowed(name: str, state: State) -> torch.Tensor:
    """§4 of the definitions: 1e-12·max|v| of a mean, 1e-13·(1 + κ)·Σ|v − v̄|^p of a central moment."""
    value = state[name]
    if "min" not in state:
        return 1e-9 * value.abs() + 1e-15
    largest = torch.maximum(state["min"].abs(), state["max"].abs()).nan_to_num(posinf=0)
    n = state["n"].clamp(min=1)
    spread = (state["m2"] / n).sqrt()
    powers = {"mean": 1e-12 * largest, "absolute": 1e-12 * value.abs()}
    if name in powers:
        return powers[name]
    power = int(name[1:])
    # Σ|v − v̄|^p is at least n·σ^p
    return 1e-12 * (spread + state["mean"].abs()) * n * spread ** (power - 1) + 1e-12 * value.abs()
