"""The co-moment primitives: exact merging, per-unit exclusion, bounded memory, every scale of numbers."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from pipeline.kernels import comoment
from pipeline.kernels.base import Primitive, State
from pipeline.kernels.comoment import CoMoment, InputCovariance
from pipeline.sites import Presentations
from tests.laws.drawn import make_presentations, make_site
from tests.statistics.compare import parts

PRIMITIVES = [CoMoment(fired=True), CoMoment(fired=False), InputCovariance()]


def drawn(rows: int = 60, *, groups: int = 1, scale: float = 1.0, offset: float = 0.0, seed: int = 0) -> Presentations:
    generator = torch.Generator().manual_seed(seed)
    site = make_site(torch.randn(6, 5, generator=generator), torch.randn(6, generator=generator), groups=groups)
    x = torch.randn(rows, 3, groups, 5, generator=generator) + offset
    return make_presentations(site, x * scale)


def merged(primitive: Primitive, whole: Presentations, sizes: list[int]) -> State:
    state = primitive.empty(whole.site)
    for part in parts(whole, sizes):
        state = primitive.merge(state, primitive.observe(part))
    return state


def covariance(whole: Presentations, unit: int) -> torch.Tensor:
    """Σ(a − ā)(x − x̄) of a unit over what counts for it, in float64 by its definition."""
    group = int(whole.site.group_U[unit])
    x = whole.patches(0, whole.entries).flatten(0, 1)[:, group].double()
    z, a = whole.z_LSU.flatten(0, 1)[:, unit].double(), whole.a_LSU.flatten(0, 1)[:, unit].double()
    keep = x.isfinite().all(-1) & z.isfinite() & a.isfinite()
    if whole.mask_LS is not None:
        keep &= whole.mask_LS.flatten()
    x, a = x[keep], a[keep]
    return (a - a.mean()) @ (x - x.mean(0))


def assert_states_close(got: State, wanted: State, *, relative: float) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype
        if value.is_floating_point():
            assert (got[name] - value).norm() <= relative * value.norm(), name
        else:
            assert torch.equal(got[name], value), name


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_any_split_gives_the_definition(groups: int) -> None:
    whole = drawn(groups=groups)
    wanted = torch.stack([covariance(whole, unit) for unit in range(6)])
    for sizes in ([60], [1] * 60, [0, 17, 0, 43], [59, 1]):
        got = merged(CoMoment(), whole, sizes)["cov_UD"]
        assert (got - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("primitive", PRIMITIVES, ids=repr)
def test_merge_orders_agree(primitive: Primitive) -> None:
    whole = drawn(groups=2)
    states = [primitive.observe(part) for part in parts(whole, [7, 1, 20, 32])]
    first, *others = [
        primitive.merge(primitive.merge(a, b), primitive.merge(c, d)) for a, b, c, d in itertools.permutations(states)
    ]
    for other in others:
        assert_states_close(other, first, relative=1e-12)


@pytest.mark.parametrize("primitive", PRIMITIVES, ids=repr)
def test_the_empty_state_changes_nothing_and_merging_changes_no_argument(primitive: Primitive) -> None:
    whole = drawn(groups=3)
    state, empty = primitive.observe(whole), primitive.empty(whole.site)
    before = {name: value.clone() for name, value in state.items()}
    for result in (primitive.merge(empty, state), primitive.merge(state, empty)):
        assert all(torch.equal(result[name], value) for name, value in before.items())
    primitive.merge(state, state)
    assert all(torch.equal(state[name], value) for name, value in before.items())
    nothing = primitive.observe(parts(whole, [0])[0])
    assert all(torch.equal(nothing[name], value) for name, value in empty.items())


def test_class_ordered_batches_of_one_keep_the_variance_between_them() -> None:
    # a widely copied streaming covariance scales the step of the mean by the batch's share: 0.00007 of the truth here
    whole = drawn(200)
    order = whole.z_LSU[:, 0, 0].argsort()
    x = whole.patches(0, 200)[order]
    ordered = make_presentations(whole.site, x)
    got = merged(CoMoment(), ordered, [1] * 200)
    wanted = torch.stack([covariance(ordered, unit) for unit in range(6)])
    assert (got["cov_UD"] - wanted).norm() <= 1e-6 * wanted.norm()


def test_a_non_finite_value_of_one_unit_is_left_out_for_that_unit_alone() -> None:
    whole = drawn()
    whole.z_LSU[4, 1, 2] = torch.nan
    whole.a_LSU[9, 0, 3] = torch.inf
    for sizes in ([60], [1] * 60, [4, 1, 55]):
        state = merged(CoMoment(), whole, sizes)
        assert state["n_U"].tolist() == [180, 180, 179, 179, 180, 180]
        for unit in range(6):
            wanted = covariance(whole, unit)
            assert (state["cov_UD"][unit] - wanted).norm() <= 1e-5 * wanted.norm()
    x = whole.patches(0, 60).flatten(0, 2).double()
    seen = torch.arange(180) != 13
    torch.testing.assert_close(state["x_mean_KD"][2], x[seen].mean(0), atol=1e-6, rtol=0)
    assert float(state["x_m2_K"][2]) == pytest.approx(float((x[seen] - x[seen].mean(0)).square().sum()), rel=1e-5)


def test_means_stay_by_group_when_all_units_lose_the_same_presentations() -> None:
    whole = drawn(groups=2)
    x = whole.patches(0, 60)
    x[5, 1, 0, 3] = torch.nan
    spoilt = make_presentations(whole.site, x)
    state = CoMoment().observe(spoilt)
    assert state["x_mean_KD"].shape == (2, 5)
    assert state["n_U"].tolist() == [179] * 3 + [180] * 3
    assert InputCovariance().observe(spoilt)["n_G"].tolist() == [179, 180]


def test_masked_presentations_are_as_if_they_had_not_been() -> None:
    whole = drawn()
    mask_LS = torch.rand(60, 3, generator=torch.Generator().manual_seed(1)) < 0.7
    masked = replace(whole, mask_LS=mask_LS)
    kept = replace(
        whole,
        z_LSU=whole.z_LSU[mask_LS][:, None],
        a_LSU=whole.a_LSU[mask_LS][:, None],
        uid_N=torch.arange(mask_LS.sum()),
    )
    kept = replace(kept, patches=lambda start, stop: whole.patches(0, 60)[mask_LS][start:stop, None])
    for primitive in PRIMITIVES:
        assert_states_close(primitive.observe(masked), primitive.observe(kept), relative=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_huge_and_tiny_inputs_neither_overflow_nor_vanish(scale: float) -> None:
    whole = drawn(scale=scale)
    got = CoMoment().observe(whole)["cov_UD"]
    wanted = torch.stack([covariance(whole, unit) for unit in range(6)])
    assert (got - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("offset", [0.0, 300.0, 1e4])
def test_a_large_mean_costs_no_digits(offset: float) -> None:
    whole = drawn(offset=offset)
    got = merged(CoMoment(), whole, [20, 20, 20])
    wanted = torch.stack([covariance(whole, unit) for unit in range(6)])
    assert (got["cov_UD"] - wanted).norm() <= 1e-5 * wanted.norm()
    x = whole.patches(0, 60).flatten(0, 2).double()
    inputs = merged(InputCovariance(), whole, [20, 20, 20])
    exact = (x - x.mean(0)).T @ (x - x.mean(0))
    assert (inputs["m2_GDD"][0] - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, -370.0, 1 / 3])
def test_what_never_varies_has_exactly_no_covariance(dtype: torch.dtype, value: float) -> None:
    whole = drawn(50)
    constant = make_presentations(whole.site, torch.full((50, 3, 1, 5), value, dtype=torch.float64), dtype=dtype)
    state = merged(CoMoment(), constant, [3, 7, 40])
    for name in ("cov_UD", "fired_UD", "a_m2_U", "x_m2_K"):
        assert not state[name].any(), name
    assert torch.equal(state["x_mean_KD"], torch.full((1, 5), value, dtype=dtype).double())


def test_inputs_are_asked_for_in_bounded_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = drawn()
    asked: list[int] = []

    def patches(start: int, stop: int) -> torch.Tensor:
        asked.append(stop - start)
        return whole.patches(start, stop)

    counted = replace(whole, patches=patches)
    one = CoMoment().observe(counted)
    monkeypatch.setattr(comoment, "SLICE_NUMBERS", 4 * 3 * 5)
    many = CoMoment().observe(counted)
    assert asked == [60] + [4] * 15
    assert_states_close(many, one, relative=1e-6)


def test_state_bytes_are_those_of_the_state() -> None:
    whole = drawn(groups=2)
    for primitive in PRIMITIVES:
        state = primitive.observe(whole)
        held = sum(value.numel() * value.element_size() for value in state.values())
        assert held == primitive.state_bytes(whole.site)
