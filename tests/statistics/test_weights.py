"""weights against SciPy and against patterns whose numbers are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch

from pipeline.kernels import vectors
from pipeline.sites import Site
from pipeline.statistics.base import Controls, Nullable, Values
from pipeline.statistics.weights import STATISTIC
from tests.laws.drawn import make_presentations, make_site
from tests.statistics.compare import same


def neurons(site: Site, twin: Site | None = None) -> dict[str, Values]:
    return dict(STATISTIC.columns(site, {}, Controls(twin))["neurons"])


def random_site(units: int = 7, fan_in: int = 11, *, groups: int = 1) -> Site:
    generator = torch.Generator().manual_seed(0)
    return make_site(
        torch.randn(units, fan_in, generator=generator), torch.randn(units, generator=generator), groups=groups
    )


@pytest.mark.parametrize(("units", "groups"), [(7, 1), (6, 2), (5, 5), (1, 1)])
@pytest.mark.parametrize("fan_in", [1, 2, 11])
def test_every_column_is_its_definition(units: int, groups: int, fan_in: int) -> None:
    site = random_site(units, fan_in, groups=groups)
    twin = replace(site, pattern_UD=site.pattern_UD.roll(1, 0))
    got = neurons(site, twin)
    whole = make_presentations(site, torch.zeros(0, 1, groups, fan_in))
    wanted = STATISTIC.define(site, whole, Controls(twin))["neurons"]
    assert got.keys() == wanted.keys()
    for name in wanted:
        same(got[name], wanted[name], atol=1e-12)


def test_moments_are_scipy_s() -> None:
    site = random_site()
    w = site.pattern_UD.numpy()
    got = neurons(site)
    np.testing.assert_allclose(got["weight_skewness"], scipy.stats.skew(w, axis=1), rtol=1e-12)
    np.testing.assert_allclose(got["weight_kurtosis"], scipy.stats.kurtosis(w, axis=1), rtol=1e-12)
    np.testing.assert_allclose(got["weight_std"], w.std(axis=1), rtol=1e-12)


def test_known_patterns_have_known_numbers() -> None:
    pattern = torch.tensor(
        [[1.0, 1, 1, 1], [3, 0, 0, 0], [0, 0, 0, 0], [0.1, 0.1, 0.1, 0.1], [1e-90, 1e-90, 0, 0]]
    ).double()
    pattern[4, :2] = 1e-90
    got = neurons(make_site(pattern))
    torch.testing.assert_close(got["effective_fan_in"], torch.tensor([4, 1, torch.nan, 4, 2]).double(), equal_nan=True)
    assert got["weight_std"].tolist()[:4] == [0, pytest.approx(np.std([3, 0, 0, 0])), 0, 0]
    assert got["weight_skewness"].isnan().tolist() == [True, False, True, True, False]


def test_the_nearest_of_equal_patterns_is_the_lowest() -> None:
    pattern = torch.randn(1, 33, generator=torch.Generator().manual_seed(1)).repeat(40, 1)
    pattern[0] *= -1
    got = neurons(make_site(pattern * torch.linspace(0.3, 7, 40)[:, None]))["neighbour_unit"]
    assert isinstance(got, Nullable)
    assert got.values.tolist() == [1, 2] + [1] * 38


def test_a_unit_alone_or_without_direction_has_no_neighbour() -> None:
    assert "neighbour_unit" not in neurons(random_site(4, groups=4))
    site = random_site(3)
    site.pattern_UD[1] = 0
    got = neurons(site)
    assert got["neighbour_unit"].valid.tolist() == [True, False, True]
    assert got["neighbour_cos"].isnan().tolist() == [False, True, False]
    assert got["neighbour_unit"].values.tolist()[::2] == [2, 0]


def test_groups_are_neighbours_only_among_themselves() -> None:
    got = neurons(random_site(6, groups=2))["neighbour_unit"]
    assert all(0 <= unit < 3 for unit in got.values[:3].tolist())
    assert all(3 <= unit < 6 for unit in got.values[3:].tolist())


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    site = random_site(50)
    whole = neurons(site)
    monkeypatch.setattr(vectors, "BLOCK_NUMBERS", 3 * 50)
    for name, values in neurons(site).items():
        same(values, whole[name], atol=1e-14)


def test_the_twin_is_beside_the_unit() -> None:
    site = random_site()
    assert not {"twin_cos", "twin_distance"} & neurons(site).keys()
    twin = replace(site, pattern_UD=-2 * site.pattern_UD)
    got = neurons(site, twin)
    torch.testing.assert_close(got["twin_cos"], torch.full((7,), -1.0).double())
    torch.testing.assert_close(got["twin_distance"], 3 * site.pattern_UD.norm(dim=-1))


def test_no_state_is_kept() -> None:
    site = random_site()
    assert STATISTIC.empty(site) == {}
    assert STATISTIC.state_bytes(site) == 0
    assert STATISTIC.merge(site, {}, {}) == {}
