"""Pooled co-moments against their definition in float64 on whole layers, and against the reference on hard numbers."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipeline.batch import Batch
from pipeline.flow.discover import discover
from pipeline.flow.tap import tapped_forward
from pipeline.kernels import bulk, copied, native_build, native_deviations, native_sums, native_tiles, pooled, tiled
from pipeline.kernels.accumulate import Reference
from pipeline.kernels.base import Primitive, State
from pipeline.kernels.comoment import CoMoment
from pipeline.kernels.pooled import Pooled
from pipeline.registry import statistics
from pipeline.sites import Presentations
from tests.kernels.fused import LAYOUTS, laid_out, recipes
from tests.laws.drawn import Recipe, draw, make_presentations, make_site, split
from tests.laws.laws import LAWS
from tests.laws.test_laws import recipes as recipes_of_laws

LAYERS = {
    "strided": (nn.Conv2d(5, 6, 3, stride=2, padding=1), (5, 9, 8)),
    "uneven": (nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(0, 2), dilation=(1, 2)), (4, 9, 11)),
    "groups": (nn.Conv2d(16, 6, 3, padding=2, dilation=2, groups=2), (16, 8, 8)),
    "groups of few channels": (nn.Conv2d(6, 12, 3, padding=1, groups=6), (6, 8, 8)),
    "one by one": (nn.Conv2d(8, 6, 1, stride=2), (8, 9, 9)),
    "unpadded": (nn.Conv2d(8, 6, 3), (8, 9, 8)),
    "same": (nn.Conv2d(3, 6, 4, padding="same"), (3, 7, 7)),
    "reflect": (nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"), (3, 7, 7)),
    "circular": (nn.Conv1d(3, 6, 3, padding=1, padding_mode="circular"), (3, 9)),
    "time": (nn.Conv1d(4, 6, 3, padding=4, dilation=4), (4, 20)),
    "volume": (nn.Conv3d(2, 4, 3, stride=2, padding=1), (2, 5, 6, 7)),
    "transposed": (nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1), (3, 5, 5)),
    "dense": (nn.Linear(9, 6), (9,)),
    "tokens": (nn.Linear(9, 6), (4, 9)),
    "wide tokens": (nn.Linear(9, 19), (4, 9)),
    "wide": (nn.Conv2d(16, 19, 3, padding=1), (16, 5, 7)),
}


def shown_by(
    layer: nn.Module, shape: Sequence[int], *, mean: float = 0.4, dtype=torch.float32, rows: Sequence[int] = (1, 20, 9)
) -> list[Presentations]:
    """What batches of so many rows show the first site of a layer and a ReLU; kept, as nothing overwrites it."""
    torch.manual_seed(0)
    model = nn.Sequential(layer, nn.ReLU()).to(dtype).eval()
    sizes, n = list(rows), sum(rows)
    x = (torch.randn(n, *shape) + mean).to(dtype)
    batches = [Batch((part,), uid) for part, uid in zip(x.split(sizes), torch.arange(n).split(sizes), strict=True)]
    found, seen = discover(model, batches[1]), []
    for batch in batches:
        tapped_forward(model, found, batch, seen.append)
    return [one for one in seen if one.site is found.sites[0]]


def defined(pieces: Sequence[Presentations]) -> dict[str, torch.Tensor]:
    """Σ(a − ā)(x − x̄), Σ over the firing of (x − x̄), E[x] and Σ‖x − x̄‖² of each unit's inputs, in float64."""
    site = pieces[0].site
    x = torch.cat([one.patches(0, one.entries).flatten(0, 1) for one in pieces]).double()
    z, a = (torch.cat([getattr(one, name).flatten(0, 1) for one in pieces]).double() for name in ("z_LSU", "a_LSU"))
    rest, group, fires = x - x.mean(0), site.group_U, (z > 0).double()
    return {
        "n_U": torch.full((site.units,), len(x)),
        "n_fired_U": (z > 0).sum(0),
        "a_mean_U": a.mean(0),
        "a_m2_U": (a - a.mean(0)).square().sum(0),
        "cov_UD": torch.einsum("pu,pud->ud", a - a.mean(0), rest[:, group]),
        # of what always fires exactly 0
        "fired_UD": torch.einsum("pu,pud->ud", fires - fires.mean(0), rest[:, group]),
        "x_mean_KD": x.mean(0),
        "x_m2_K": rest.square().sum((0, 2)),
    }


def native() -> ctypes.CDLL:
    library = native_build.kernel()
    assert not isinstance(library, str), library
    return library


@pytest.fixture(params=["torch", "native", "tiles", "bulk"])
def _left(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Matrices made by torch and natively, tiles, and much at once."""
    if request.param == "tiles":
        request.getfixturevalue("_tiles")
        yield
        return
    monkeypatch.setattr(native_tiles, "kernel", lambda: None)
    if request.param == "bulk":
        monkeypatch.setattr(bulk, "in_bulk", lambda value: True)
        monkeypatch.setattr(bulk, "LONGEST", 16)
    with native_sums.in_force(native() if request.param == "native" else None):
        yield


@pytest.fixture
def _tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles wherever they can be read, however little of them is used."""
    with native_sums.in_force(native()):
        if native_tiles.kernel() is None:
            pytest.skip("the processor has no matrix unit")
        monkeypatch.setattr(tiled, "LEAST_USE", 0.0)
        yield


both = pytest.mark.usefixtures("_left")


def grown(pieces: Sequence[Presentations]) -> tuple[State, Pooled]:
    kernel = Pooled(pieces[0].site, CoMoment())
    for piece in pieces:
        kernel.add(piece)
    return dict(kernel.states()[CoMoment()]), kernel


def assert_close(got: State, wanted: State, *, relative: float = 1e-5) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name].shape == value.shape, name
        if value.is_floating_point():
            assert (got[name] - value).norm() <= relative * value.norm(), name
        else:
            assert torch.equal(got[name], value), name


@both
@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", sorted(LAYERS))
def test_layers_give_what_their_explicit_inputs_define(name: str) -> None:
    layer, shape = LAYERS[name]
    pieces = shown_by(layer, shape)
    state, kernel = grown(pieces)
    assert kernel.pooled >= 29 * pieces[0].positions
    assert_close(state, defined(pieces), relative=3e-6)


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["strided", "groups of few channels", "tokens"])
def test_other_precisions_are_widened_before_anything_is_added(name: str, dtype: torch.dtype) -> None:
    pieces = shown_by(*LAYERS[name], dtype=dtype)
    state, _ = grown(pieces)
    assert_close(state, defined(pieces), relative=1e-12 if dtype == torch.float64 else 3e-6)


@both
@pytest.mark.parametrize("mean", [3.0, 300.0, -1e4])
@pytest.mark.parametrize("name", ["uneven", "groups", "unpadded", "tokens"])
def test_inputs_far_from_0_lose_no_digits(name: str, mean: float) -> None:
    layer, shape = LAYERS[name]
    pieces = shown_by(layer, shape, mean=mean)
    assert_close(grown(pieces)[0], defined(pieces))


@both
def test_the_rows_of_a_sample_are_shown_as_windows_too() -> None:
    pieces = [one.select_rows(one.uid_N % 3 == 1) for one in shown_by(*LAYERS["strided"])]
    pieces = [one for one in pieces if one.rows]
    state, kernel = grown(pieces)
    assert kernel.pooled == sum(one.entries for one in pieces) * pieces[0].positions
    assert_close(state, defined(pieces), relative=3e-6)


@both
def test_many_slices_blocks_and_pools_are_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("strided", "groups", "tokens"):
        pieces = shown_by(*LAYERS[name])
        one, _ = grown(pieces)
        with monkeypatch.context() as patch:
            patch.setattr(pooled, "SLICE_NUMBERS", 4000)
            patch.setattr(bulk, "NUMBERS", 4000)
            patch.setattr(copied, "BLOCK_NUMBERS", 1)
            patch.setattr(pooled, "KEPT", 2)
            many, _ = grown(pieces)
        assert_close(many, one, relative=1e-6)


SIZES = {
    "strided": (nn.Conv2d(20, 40, 3, stride=2, padding=1), (20, 9, 8)),
    "one by one": (nn.Conv2d(32, 17, 1), (32, 5, 5)),
    "groups": (nn.Conv2d(36, 66, (1, 3), padding=(0, 1), groups=2), (36, 2, 9)),
    "few channels": (nn.Conv2d(3, 24, 3, padding=1), (3, 7, 7)),
    "volume": (nn.Conv3d(24, 24, 2, padding=1, dilation=2), (24, 2, 3, 4)),
    "channels last": (nn.Conv2d(24, 24, 3).to(memory_format=torch.channels_last), (24, 6, 6)),
    "dense": (nn.Linear(50, 90), (50,)),
    "tokens": (nn.Linear(64, 33), (9, 64)),
}


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("at_once", [64, 1 << 15])
@pytest.mark.parametrize("name", sorted(SIZES))
def test_tiles_of_every_form_give_what_float64_does(name: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "LARGEST", at_once)
    monkeypatch.setattr(pooled, "KEPT", 3)
    layer, shape = SIZES[name]
    pieces = shown_by(layer, shape, rows=(70, 33, 19))
    state, kernel = grown(pieces)
    assert all(tiled.plan(one, fired=True) for one in pieces)
    assert kernel.pooled == 122 * pieces[0].positions
    assert_close(state, defined(pieces), relative=4e-7)


@both
def test_asking_for_the_state_changes_nothing() -> None:
    pieces = shown_by(*LAYERS["strided"])
    wanted, _ = grown(pieces)
    kernel = Pooled(pieces[0].site, CoMoment())
    for piece in pieces:
        kernel.add(piece)
        before = {name: value.clone() for name, value in kernel.states()[CoMoment()].items()}
        for again in (kernel.states()[CoMoment()],):
            assert all(torch.equal(again[name], value) for name, value in before.items())
    assert all(torch.equal(kernel.states()[CoMoment()][name], value) for name, value in wanted.items())


@both
@pytest.mark.parametrize("value", [0.1, -370.0, 1 / 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_units_that_never_vary_have_exactly_no_covariance(value: float, dtype: torch.dtype) -> None:
    whole = draw(Recipe(3, rows=700, positions=11, units=4, fan_in=8))
    a_LSU = torch.full_like(whole.a_LSU, value)
    z_LSU = whole.z_LSU.abs() + 1
    z_LSU[..., 1] *= -1
    constant = replace(whole, z_LSU=z_LSU, a_LSU=a_LSU)
    constant = replace(constant, z_LSU=z_LSU.to(dtype), a_LSU=a_LSU.to(dtype))
    state, kernel = grown(split(constant, torch.arange(700) % 3))
    assert kernel.pooled == 7700
    for name in ("cov_UD", "fired_UD", "a_m2_U"):
        assert not state[name].any(), name
    assert torch.equal(state["a_mean_U"], torch.full((4,), value, dtype=dtype).double())
    assert state["n_fired_U"].tolist() == [7700, 0, 7700, 7700]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(recipe=recipes, layout=st.sampled_from(sorted(LAYOUTS)))
def test_drawn_batches_give_the_state_of_the_reference(recipe: Recipe, layout: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pooled, "NARROW", 1)  # not of the reference
        assert_state_of_the_reference(laid_out(draw(recipe), layout))


@pytest.mark.parametrize("fan_in", [1, 3, 8, 27, 64])
@pytest.mark.parametrize("units", [2, 64])
@pytest.mark.parametrize("order", ["drawn", "sorted"])
@both
def test_equal_terms_by_the_thousand_keep_float32s_promise(fan_in: int, units: int, order: str) -> None:
    """Terms of few values are all rounded to the same side, so that the error of a sum grows with its length."""
    random = np.random.default_rng(0)
    x = random.integers(0, 4, (1 << 15, fan_in)) / 10
    site = make_site(random.normal(size=(units, fan_in)), random.normal(size=units) + 1, gate="relu")
    shown = make_presentations(site, np.sort(x, axis=0) if order == "sorted" else x)
    assert_as_near(grown([shown])[0], defined([shown]))
    assert_as_near(CoMoment().observe(shown), defined([shown]))


def assert_state_of_the_reference(shown: Presentations) -> None:
    pieces = split(shown, torch.arange(shown.rows) % 2) or [shown]
    theirs = Reference(shown.site, [CoMoment()])
    for piece in pieces:
        theirs.add(piece)
    for library in (None, native()):
        ours = Pooled(shown.site, CoMoment())
        with native_sums.in_force(library):
            for piece in pieces:
                ours.add(piece)
        assert_as_near(ours.states()[CoMoment()], theirs.states()[CoMoment()])


def assert_as_near(mine: State, yours: State) -> None:
    for name in ("n_U", "n_fired_U"):
        assert torch.equal(mine[name], yours[name])
    scale_U = (yours["a_m2_U"] * yours["x_m2_K"].repeat_interleave(len(mine["n_U"]) // len(yours["x_m2_K"]))).sqrt()
    for name, size_U in (("cov_UD", scale_U), ("fired_UD", (mine["n_U"] * yours["x_m2_K"].max()).sqrt())):
        # a covariance that is chance alone is 1/√n of what it could be
        assert ((mine[name] - yours[name]).norm(dim=1) <= 1e-5 * size_U + 1e-300).all(), name


@pytest.mark.parametrize("law", ["oracle", "oracle_of_parts", "partition", "row_order"])
@pytest.mark.parametrize("name", ["template", "composition"])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(recipe=recipes_of_laws)
def test_the_laws_hold(name: str, law: str, recipe: Recipe) -> None:
    def observe_all(needed: list[Primitive], shown: Presentations) -> list[State]:
        kernels = [
            Pooled(shown.site, one) if isinstance(one, CoMoment) else Reference(shown.site, [one]) for one in needed
        ]
        for kernel in kernels:
            kernel.add(shown)
        return [kernel.states()[one] for kernel, one in zip(kernels, needed, strict=True)]

    statistic, shown = statistics()[name], draw(recipe)
    with pytest.MonkeyPatch.context() as patch, native_sums.in_force(native() if recipe.seed % 2 else None):
        patch.setattr("pipeline.statistics.base.observe_all", observe_all)
        LAWS[law](statistic, shown, np.random.default_rng(recipe.seed))


@both
def test_masked_positions_are_left_out_of_dense_layers_and_windows() -> None:
    for name in ("tokens", "time"):
        pieces = shown_by(*LAYERS[name])
        generator = torch.Generator().manual_seed(1)
        masked = [
            replace(one, mask_LS=torch.rand(one.z_LSU.shape[:2], generator=generator) < 0.6) for one in pieces[1:]
        ]
        state, kernel = grown(masked)
        assert kernel.pooled == sum(int(one.mask_LS.sum()) for one in masked if one.mask_LS is not None)
        reference = Reference(masked[0].site, [CoMoment()])
        for one in masked:
            reference.add(one)
        assert_close(state, dict(reference.states()[CoMoment()]))


@both
def test_batches_with_padding_and_without_are_as_one() -> None:
    """Windows count the taps before the channels, patches of what is not masked the channels before the taps."""
    pieces = shown_by(*LAYERS["strided"])
    nothing = [replace(one, mask_LS=torch.ones(one.z_LSU.shape[:2], dtype=torch.bool)) for one in pieces]
    for mixed in ([pieces[1], nothing[2], pieces[0]], [nothing[1], pieces[2], nothing[0]]):
        state, kernel = grown(mixed)
        assert kernel.pooled >= 29 * pieces[0].positions
        assert_close(state, defined(pieces), relative=3e-6)


@both
def test_what_float32_cannot_multiply_goes_to_the_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    x, site = torch.randn(50, 3, 1, 5, generator=generator), make_site(torch.randn(4, 5, generator=generator))
    for scale in (1e-30, 1e-13, 1e12, 1e18):
        shown = make_presentations(site, x * scale)
        state, kernel = grown([shown])
        assert kernel.pooled == 0
        assert_close(state, defined([shown]))
    # inputs too small or large to be squared, of units whose activations are as usual
    for scale in (1e-25, 1e25):
        shown = make_presentations(site, x * scale, z_LSU=torch.randn(50, 3, 4, generator=generator))
        state, kernel = grown([shown])
        assert kernel.pooled == 0
        assert_close(state, defined([shown]))
    spoilt = make_presentations(site, x)
    spoilt.patches(0, 50)[3, 1, 0, 2] = torch.inf
    spoilt.z_LSU[7, 2, 1] = torch.nan
    assert grown([spoilt])[0]["n_U"].tolist() == [149, 148, 149, 149]


@both
@pytest.mark.parametrize("value", [-torch.inf, torch.nan])
def test_what_a_gate_makes_finite_of_z_that_is_not_is_no_presentation(value: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, site = torch.randn(50, 3, 1, 9, generator=generator), make_site(torch.randn(4, 9, generator=generator))
    shown = make_presentations(site, x)
    z_LSU = shown.z_LSU.clone()
    z_LSU[7, 2, 1] = value
    spoilt = replace(shown, z_LSU=z_LSU, a_LSU=z_LSU.nan_to_num(0, neginf=0).relu())
    state, kernel = grown([spoilt])
    assert kernel.pooled == 0
    assert state["n_U"].tolist() == [150, 149, 150, 150]


@pytest.mark.parametrize("layout", ["units side by side", "positions side by side", "neither"])
@pytest.mark.parametrize("units", [1, 8, 43])
def test_the_native_left_operands_are_deviations_from_means(layout: str, units: int) -> None:
    orders = {
        "units side by side": (0, 2, 3, 1), "positions side by side": (0, 1, 2, 3), "neither": (3, 2, 1, 0),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    made = torch.randn((4, 2, units, 3, 21), generator=generator).unbind(0)
    order = orders[layout]
    z, a, rest, fired = (one.permute(order).contiguous().permute(np.argsort(order).tolist()) for one in made)
    assert units == 1 or {"units side by side": z.stride(1), "positions side by side": z.stride(3)}.get(layout, 1) == 1
    with native_sums.in_force(native()):
        assert native_deviations.takes(z, a)
        found = native_deviations.deviations(z, a + 3, rest, fired)
        assert found is not None
        wide, fires = (a + 3).double(), (z > 0).double()
        near = {"rtol": 0, "atol": 1e-6, "check_dtype": False}
        torch.testing.assert_close(found.about_Gu, wide.mean((2, 3)), **near)
        torch.testing.assert_close(rest, wide - found.about_Gu.double()[..., None, None], **near)
        torch.testing.assert_close(fired, fires - fires.mean((2, 3), keepdim=True), **near)
        torch.testing.assert_close(found.rest_Gu, rest.double().sum((2, 3)), rtol=0, atol=1e-12)
        torch.testing.assert_close(found.square_Gu, rest.double().square().sum((2, 3)), rtol=1e-14, atol=0)
        assert torch.equal(found.fired_Gu, fires.sum((2, 3)))
        for value in (torch.nan, torch.inf, -torch.inf):
            for unit in (0, units - 1):
                spoilt = z.clone()
                spoilt[1, unit, 2, 20] = value
                assert native_deviations.deviations(spoilt, a, rest, fired) is None
