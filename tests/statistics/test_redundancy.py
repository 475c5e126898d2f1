"""redundancy against NumPy, planted copies and known spectra."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.kernels import pairs
from pipeline.kernels.pairs import UnitPairs
from pipeline.sites import Presentations
from pipeline.statistics.base import Controls, Nullable, Values
from pipeline.statistics.redundancy import STATISTIC, Redundancy, _dimension
from tests.laws.drawn import make_presentations, make_site, permuted, reordered
from tests.statistics.compare import same_rows, state_of


def neurons(whole: Presentations, statistic: Redundancy = STATISTIC) -> dict[str, Values]:
    return dict(statistic.columns(whole.site, statistic.observe(whole), Controls())["neurons"])


def independent(units: int = 12, rows: int = 400, *, gate: str = "relu", seed: int = 0) -> Presentations:
    """Units that each read an input of their own."""
    generator = torch.Generator().manual_seed(seed)
    site = make_site(torch.eye(units), gate=gate)
    return make_presentations(site, torch.randn(rows, units, generator=generator))


def with_units(whole: Presentations, z_NU: torch.Tensor) -> Presentations:
    return replace(whole, z_LSU=z_NU[:, None].float(), a_LSU=z_NU[:, None].float().relu())


def test_the_partner_is_numpy_s() -> None:
    whole = independent()
    a = whole.a_LSU[:, 0].double().numpy()
    r = np.corrcoef(a.T)
    np.fill_diagonal(r, 0)
    got = neurons(whole)
    partner = np.abs(r).argmax(1)
    assert isinstance(got["redundancy_unit"], Nullable)
    assert got["redundancy_unit"].values.tolist() == partner.tolist()
    np.testing.assert_allclose(got["redundancy_r"], r[np.arange(12), partner], atol=1e-6)
    assert got["redundancy_compared"].tolist() == [11] * 12


@pytest.mark.parametrize("sizes", [[400], [1, 399], [100, 0, 200, 100], [40] * 10])
@pytest.mark.parametrize("largest", [512, 12, 11, 5, 2])
def test_any_split_gives_the_definition(sizes: list[int], largest: int) -> None:
    whole, statistic = independent(), Redundancy(largest=largest)
    same_rows(statistic, state_of(statistic, whole, sizes), whole, atol=1e-5)


def test_slices_of_a_wide_site_have_as_many_presentations_as_its_units_have_others(monkeypatch) -> None:
    merged: list[int] = []
    merge = UnitPairs.merge
    monkeypatch.setattr(UnitPairs, "merge", lambda *given: merged.append(int(given[2]["n_1"])) or merge(*given))
    monkeypatch.setattr(pairs, "SLICE_NUMBERS", 1)
    whole = independent(units=40, rows=50)
    STATISTIC.observe(whole)
    assert merged == [20, 10]


def test_a_planted_copy_and_a_mirror_image_are_found() -> None:
    whole = independent()
    z = whole.z_LSU[:, 0].clone()
    z[:, 7] = 3 * z[:, 2] + 1e-3 * z[:, 7]
    got = neurons(with_units(whole, z))
    assert isinstance(got["redundancy_unit"], Nullable)
    assert got["redundancy_unit"].values[[2, 7]].tolist() == [7, 2]
    assert float(got["redundancy_r"][2]) > 0.999
    fires = float((z[:, 2] > 0).float().mean())
    assert float(got["redundancy_lift"][2]) == pytest.approx(1 / fires, rel=0.01)
    mirrored = whole.z_LSU.clone()
    mirrored[..., 5] = -mirrored[..., 1]
    tanh = neurons(replace(whole, z_LSU=mirrored, a_LSU=mirrored.tanh()))
    assert float(tanh["redundancy_r"][1]) == pytest.approx(-1, abs=1e-6)
    assert float(tanh["redundancy_lift"][1]) == 0


def test_equal_partners_give_the_lowest() -> None:
    whole = independent(40, 300)
    z = whole.z_LSU[:, 0, :1] * torch.linspace(0.1, 5, 40)
    got = neurons(with_units(whole, z))["redundancy_unit"]
    assert isinstance(got, Nullable)
    assert got.values.tolist() == [1] + [0] * 39


def test_the_dimension_of_known_spectra() -> None:
    flat = neurons(independent(20, 20_000, gate="identity"))
    assert float(flat["redundancy_dimension"][0]) == pytest.approx(20, rel=0.02)
    whole = independent(20, 500, gate="identity")
    line = whole.z_LSU[:, 0, :1] * torch.linspace(1, 2, 20)
    one = neurons(replace(whole, z_LSU=line[:, None], a_LSU=line[:, None]))
    assert float(one["redundancy_dimension"][0]) == pytest.approx(1, rel=1e-5)
    assert "redundancy_lift" not in flat


def test_a_part_of_the_pairs_estimates_the_dimension_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(2)
    site = make_site(torch.randn(64, 10, generator=generator), gate="identity")
    whole = make_presentations(site, torch.randn(5_000, 10, generator=generator))
    all_pairs = float(neurons(whole)["redundancy_dimension"][0])
    some = neurons(whole, Redundancy(largest=16))
    assert float(some["redundancy_dimension"][0]) == pytest.approx(all_pairs, rel=0.15)
    assert set(some["redundancy_compared"].tolist()) == {16}


def test_units_that_never_vary_or_are_not_finite_are_nobody_s_partner() -> None:
    whole = independent()
    z = whole.z_LSU[:, 0].clone()
    z[:, 0] = -1
    z[3, 1] = torch.nan
    got = neurons(with_units(whole, z))
    assert isinstance(got["redundancy_unit"], Nullable)
    assert got["redundancy_unit"].valid.tolist() == [False, False] + [True] * 10
    assert got["redundancy_r"].isnan().tolist() == [True, True] + [False] * 10
    assert got["redundancy_compared"].tolist() == [0, 0] + [9] * 10
    assert min(got["redundancy_unit"].values[2:].tolist()) >= 2


def test_the_order_of_units_and_rows_does_not_matter() -> None:
    whole = independent()
    order_U = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    got, other = neurons(whole), neurons(permuted(whole, order_U))
    torch.testing.assert_close(other["redundancy_r"], got["redundancy_r"][order_U], atol=1e-6, rtol=0)
    assert isinstance(got["redundancy_unit"], Nullable)
    assert isinstance(other["redundancy_unit"], Nullable)
    assert torch.equal(order_U[other["redundancy_unit"].values], got["redundancy_unit"].values[order_U])
    again = neurons(reordered(whole, torch.arange(400).flip(0)))
    torch.testing.assert_close(again["redundancy_r"], got["redundancy_r"], atol=1e-6, rtol=0)


def test_the_state_of_a_unit_is_bounded() -> None:
    wide = make_site(torch.zeros(4096, 1))
    assert STATISTIC.state_bytes(wide) / 4096 < 3.2e3


def test_the_estimated_dimension_of_one_signal_is_one_whatever_varies_most() -> None:
    scale_U = torch.tensor([100.0, 1, 1, 1, 100, 1, 1, 1], dtype=torch.float64)
    reference_K = torch.tensor([0, 4])
    everyone_U = torch.ones(8, dtype=torch.bool)
    others_UK = torch.arange(8)[:, None] != reference_K
    co_UK = scale_U[:, None] * scale_U[reference_K]
    found_U = _dimension(co_UK, scale_U.square(), reference_K, everyone_U, others_UK)
    torch.testing.assert_close(found_U, torch.ones(8, dtype=torch.float64), rtol=1e-12, atol=0)
