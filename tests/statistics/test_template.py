"""template against its definition, Gaussian theory, planted patterns, and the mistakes that flatter it."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.sites import Presentations
from pipeline.statistics.base import Controls
from pipeline.statistics.template import RIDGE, STATISTIC, _quantile
from tests.laws.drawn import make_presentations, make_site
from tests.statistics.compare import same_rows, state_of


def neurons(whole: Presentations) -> dict[str, torch.Tensor]:
    return dict(STATISTIC.columns(whole.site, STATISTIC.observe(whole), Controls())["neurons"])  # type: ignore[arg-type]


def gaussian(rows: int, fan_in: int, *, gate: str = "relu") -> Presentations:
    """Correlated Gaussian inputs to four units with biases."""
    generator = torch.Generator().manual_seed(7)
    mixing = torch.eye(fan_in) + 0.5 * torch.randn(fan_in, fan_in, generator=generator, dtype=torch.float64) / sqrt(
        fan_in
    )
    site = make_site(
        torch.randn(4, fan_in, generator=generator, dtype=torch.float64),
        torch.tensor([0.0, 0.7, -0.9, 2.0], dtype=torch.float64),
        gate=gate,
    )
    x = torch.randn(rows, fan_in, generator=generator, dtype=torch.float64) @ mixing.T + 3.0
    site = replace(site, bias_U=site.bias_U - 3.0 * site.pattern_UD.sum(-1))
    return make_presentations(site, x.float()[:, None, None])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    units_and_groups=st.sampled_from([(1, 1), (5, 1), (6, 2), (3, 3)]),
    fan_in=st.integers(1, 9),
    rows=st.integers(0, 40),
    positions=st.integers(1, 3),
    gate=st.sampled_from(["relu", "tanh", "identity"]),
    spoil=st.booleans(),
    pruned=st.booleans(),
)
def test_every_column_is_its_definition(
    seed: int,
    units_and_groups: tuple[int, int],
    fan_in: int,
    rows: int,
    positions: int,
    gate: str,
    spoil: bool,
    pruned: bool,
) -> None:
    units, groups = units_and_groups
    generator = torch.Generator().manual_seed(seed)
    weight_UD = torch.randn(units, fan_in, generator=generator)
    # to a unit without a pattern no other one has a cosine
    weight_UD[units // 2] *= not pruned
    site = make_site(
        weight_UD,
        torch.randn(units, generator=generator),
        gate=gate,
        groups=groups,
    )
    whole = make_presentations(site, torch.randn(rows, positions, groups, fan_in, generator=generator))
    if spoil and rows > 2:
        whole.z_LSU[1, 0, 0] = torch.nan
        whole.patches(0, rows)[2, 0, -1, 0] = torch.inf
    cuts = sorted(torch.randint(0, rows + 1, (2,), generator=generator).tolist())
    state = state_of(STATISTIC, whole, [cuts[0], cuts[1] - cuts[0], rows - cuts[1]])
    same_rows(STATISTIC, state, whole, atol=1e-4)


@pytest.mark.parametrize("columns", [1, 2, 7, 300])
@pytest.mark.parametrize("undefined", [0.0, 0.3, 1.0])
def test_quantiles_are_those_of_torch_to_the_bit(columns: int, undefined: float) -> None:
    generator = torch.Generator().manual_seed(columns)
    rows = torch.randn((20, columns), generator=generator, dtype=torch.float64)
    rows[torch.rand((20, columns), generator=generator) < undefined] = torch.nan
    found = _quantile(rows, (~rows.isnan()).sum(-1), 0.95)
    torch.testing.assert_close(found, rows.nanquantile(0.95, dim=-1), rtol=0, atol=0, equal_nan=True)


def test_gaussian_inputs_give_what_stein_s_lemma_says() -> None:
    whole = gaussian(200_000, 12)
    x = whole.patches(0, whole.entries)[:, 0, 0].double()
    sigma = (x - x.mean(0)).T @ (x - x.mean(0)) / len(x)
    state = STATISTIC.observe(whole)
    rate_U1 = (whole.z_LSU[:, 0] > 0).double().mean(0)[:, None]
    expected = rate_U1 * (whole.site.pattern_UD @ sigma)
    got = state["comoment.cov_UD"] / len(x)
    # sampling error: 12 entries of about sd(a)·sd(x)/√n each
    assert ((got - expected).norm(dim=-1) <= 4 * sqrt(12 / len(x)) * expected.norm(dim=-1)).all()
    values = neurons(whole)
    assert (values["template_cos_whitened"] > 0.999).all()
    assert (values["template_cos"] < 0.99).all()


def test_a_gate_less_site_has_no_whitened_cosine_since_it_is_1_by_construction() -> None:
    whole = gaussian(500, 6, gate="identity")
    values = neurons(whole)
    assert not {"template_cos_whitened", "template_cos_sta"} & values.keys()
    assert "sta" not in STATISTIC.columns(whole.site, STATISTIC.observe(whole), Controls())["patterns"]
    x = whole.patches(0, 500)[:, 0, 0].double()
    sigma = (x - x.mean(0)).T @ (x - x.mean(0)) / len(x)
    cov = STATISTIC.observe(whole)["comoment.cov_UD"] / len(x)
    direction = torch.linalg.solve(sigma, cov.T).T
    cosines = torch.nn.functional.cosine_similarity(direction, whole.site.pattern_UD)
    torch.testing.assert_close(cosines, torch.ones(4, dtype=torch.float64), atol=1e-6, rtol=0)


def test_a_planted_pattern_is_found_and_its_controls_are_not() -> None:
    generator = torch.Generator().manual_seed(3)
    planted = torch.randn(8, 64, generator=generator)
    planted /= planted.norm(dim=-1, keepdim=True)
    kind = torch.randint(0, 8, (4000,), generator=generator)
    x = 6 * planted[kind] + 0.3 * torch.randn(4000, 64, generator=generator)
    values = neurons(make_presentations(make_site(planted, torch.full((8,), -3.0)), x[:, None, None]))
    assert (values["template_cos"] > 0.9).all()
    assert (values["template_cos_sta"] > 0.9).all()
    assert (values["template_cos_permuted_mean"] < 0.2).all()
    # 64 entries: |cos| of two random directions is √(2/64π) ≈ 0.1
    assert (values["template_cos_other_mean"] < 0.25).all()


def test_an_isotropic_twin_looks_like_a_success_without_its_control() -> None:
    # with white inputs S ∝ w for any weights: an untrained unit scores 1, so only a comparison means anything
    generator = torch.Generator().manual_seed(4)
    site = make_site(torch.randn(5, 10, generator=generator))
    values = neurons(make_presentations(site, torch.randn(20_000, 1, 1, 10, generator=generator)))
    assert (values["template_cos"] > 0.99).all()


def test_dead_always_on_and_constant_units_are_undefined_not_zero() -> None:
    generator = torch.Generator().manual_seed(5)
    site = make_site(torch.randn(4, 6, generator=generator), torch.tensor([-100.0, 100.0, 0.0, 0.0]))
    site = replace(site, pattern_UD=site.pattern_UD * torch.tensor([[1.0], [1.0], [0.0], [1.0]], dtype=torch.float64))
    values = neurons(make_presentations(site, torch.rand(300, 1, 1, 6, generator=generator)))
    assert values["template_cos"].isnan().tolist() == [True, False, True, False]
    assert values["template_cos_sta"].isnan().tolist() == [True, True, True, False]
    assert values["template_n"].tolist() == [300] * 4
    assert not values["template_cos_other_mean"][3].isnan()


def test_inputs_that_never_vary_do_not_spoil_the_whitened_form() -> None:
    whole = gaussian(20_000, 6)
    x = torch.cat([whole.patches(0, 20_000), torch.zeros(20_000, 1, 1, 2)], -1)
    pattern = torch.cat([whole.site.pattern_UD, torch.zeros(4, 2)], -1)
    site = make_site(pattern, whole.site.bias_U)
    assert (neurons(make_presentations(site, x))["template_cos_whitened"] > 0.99).all()
    assert 0 < RIDGE < 0.01


def test_above_the_limit_nothing_is_whitened_and_no_square_state_is_kept() -> None:
    whole = gaussian(50, 12)
    small = replace(STATISTIC, whitened_fan_in=11)
    assert not any(name.startswith("inputs.") for name in small.empty(whole.site))
    assert "template_cos_whitened" not in small.columns(whole.site, small.observe(whole), Controls())["neurons"]


def test_patterns_carry_everything_that_a_unit_is_shown_with() -> None:
    whole = gaussian(400, 12)
    site = replace(whole.site, folded=("norm",), raw_UD=2 * whole.site.pattern_UD)
    patterns = STATISTIC.columns(site, STATISTIC.observe(replace(whole, site=site)), Controls())["patterns"]
    assert set(patterns) == {"unit", "weight", "bias", "raw_weight", "cov", "sta", "mean_x"}
    x, fires = whole.patches(0, 400)[:, 0, 0].double(), whole.z_LSU[:, 0, 1] > 0
    torch.testing.assert_close(patterns["sta"][1].double(), x[fires].mean(0) - x.mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(patterns["mean_x"][0].double(), x.mean(0), atol=1e-6, rtol=1e-6)
    assert all(value.dtype == torch.float32 for name in ("weight", "cov", "sta") for value in patterns[name])
