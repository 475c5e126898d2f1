"""composition: its sum law, what planted upstream units give, and where each edge leads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pipeline.sites import InputSpace, Presentations, Site
from pipeline.statistics.base import Controls, Values
from pipeline.statistics.composition import STATISTIC, Composition
from tests.laws.drawn import make_presentations, make_site
from tests.statistics.compare import state_of


def rows(
    whole: Presentations, statistic: Composition = STATISTIC, sizes: list[int] | None = None
) -> dict[str, dict[str, Values]]:
    state = state_of(statistic, whole, sizes or [whole.rows])
    return {name: dict(table) for name, table in statistic.columns(whole.site, state, Controls()).items()}


def random_site(units: int = 5, shape: tuple[int, ...] = (12,), *, groups: int = 1) -> Site:
    generator = torch.Generator().manual_seed(0)
    fan_in = int(torch.tensor(shape).prod())
    site = make_site(torch.randn(units, fan_in, generator=generator), groups=groups)
    # inputs are drawn from [0, 1]: every unit fires at some and not at all
    return replace(site, bias_U=-0.5 * site.pattern_UD.sum(-1), inputs=InputSpace("units", shape))


def random_rows(site: Site, rows: int = 300, positions: int = 2) -> Presentations:
    generator = torch.Generator().manual_seed(1)
    return make_presentations(site, torch.rand(rows, positions, site.groups, site.fan_in, generator=generator))


@pytest.mark.parametrize("sizes", [[300], [1] * 20 + [280], [150, 0, 150]])
@pytest.mark.parametrize("groups", [1, 5])
def test_contributions_add_up_to_the_rise_of_z(sizes: list[int], groups: int) -> None:
    whole = random_rows(random_site(groups=groups))
    got = rows(whole, replace(STATISTIC, top=99), sizes)
    z_PU = whole.z_LSU.flatten(0, 1).double()
    rise = torch.stack([z[z > 0].mean() - z.mean() for z in z_PU.T])
    torch.testing.assert_close(got["neurons"]["composition_total"], rise, atol=1e-6, rtol=1e-5)
    edges = got["edges"]
    summed = torch.zeros(5, dtype=torch.float64).index_add_(0, edges["unit"], edges["contribution"])
    torch.testing.assert_close(summed, rise, atol=1e-6, rtol=1e-5)
    shares = torch.zeros(5, dtype=torch.float64).index_add_(0, edges["unit"], edges["share"])
    torch.testing.assert_close(shares, torch.ones(5, dtype=torch.float64))


def test_edges_are_ranked_by_size() -> None:
    edges = rows(random_rows(random_site()))["edges"]
    for unit in range(5):
        mine = edges["unit"] == unit
        assert edges["rank"][mine].tolist() == list(range(8))
        assert len(set(edges["input"][mine].tolist())) == 8
        sizes = edges["contribution"][mine].abs()
        assert (sizes.diff() <= 1e-9).all()


def test_an_input_that_holds_back_what_its_companion_drives_has_a_negative_share() -> None:
    x = torch.rand(500, 1, generator=torch.Generator().manual_seed(3))
    whole = make_presentations(make_site([[1.0, -0.25]], [-0.3]), torch.cat([x, x], 1))
    edges = rows(whole)["edges"]
    assert edges["input"].tolist() == [0, 1]
    assert edges["share"].tolist() == pytest.approx([4 / 3, -1 / 3], abs=1e-5)


def test_kernel_positions_of_a_channel_are_one_input() -> None:
    site = random_site(3, (4, 3, 3))
    whole = random_rows(site)
    edges = rows(whole, replace(STATISTIC, top=4))["edges"]
    assert sorted(edges["input"][:4].tolist()) == [0, 1, 2, 3]
    x, fires = whole.patches(0, 300).flatten(0, 2).double(), whole.z_LSU[..., 0].flatten() > 0
    terms = (site.pattern_UD[0] * (x[fires].mean(0) - x.mean(0))).view(4, 9).sum(1)
    torch.testing.assert_close(edges["contribution"][:4], terms[edges["input"][:4]], atol=1e-6, rtol=1e-4)


def test_every_pixel_of_a_dense_layer_is_an_input() -> None:
    site = random_site(3, (1, 3, 4))
    over_pixels = replace(site, inputs=InputSpace("pixels", (1, 3, 4)))
    assert len(set(rows(random_rows(over_pixels), replace(STATISTIC, top=99))["edges"]["input"].tolist())) == 12
    convolved = replace(over_pixels, kind="conv2d")
    assert set(rows(random_rows(convolved))["edges"]["input"].tolist()) == {0}


def test_a_planted_detector_is_made_of_what_it_detects() -> None:
    generator = torch.Generator().manual_seed(2)
    on = (torch.rand(2000, 10, generator=generator) < 0.3).float()
    weight = torch.zeros(1, 10)
    weight[0, [3, 7]] = 1.0
    weight[0, 5] = -1.0
    whole = make_presentations(make_site(weight, torch.tensor([-1.5])), on)
    edges = rows(whole, replace(STATISTIC, top=3))["edges"]
    assert sorted(edges["input"].tolist()) == [3, 5, 7]
    assert (edges["contribution"] > 0).all()
    # 3 and 7 must both be on: each rises from 0.3 to 1; 5 must be off
    assert edges["contribution"].sort().values.tolist() == pytest.approx([0.3, 0.7, 0.7], abs=0.05)


def test_edges_lead_to_upstream_units() -> None:
    site = random_site(3, (4, 3, 3))
    wired = replace(
        site, inputs=replace(site.inputs, upstream=("conv1", "conv0"), upstream_unit=((0, 2), (0, 3), (1, 0), (1, 1)))
    )
    edges = rows(random_rows(wired))["edges"]
    named = {
        (channel, name, unit)
        for channel, name, unit in zip(
            edges["input"].tolist(), edges["upstream"], edges["upstream_unit"].tolist(), strict=True
        )
    }
    assert named == {(0, "conv1", 2), (1, "conv1", 3), (2, "conv0", 0), (3, "conv0", 1)}


def test_after_a_flatten_the_positions_of_an_upstream_unit_are_one_edge() -> None:
    site = random_site(3, (12,))
    flat = replace(
        site, inputs=replace(site.inputs, upstream=("conv",), upstream_unit=tuple((0, d // 4) for d in range(12)))
    )
    whole = random_rows(flat)
    edges = rows(whole)["edges"]
    assert edges["upstream_unit"].bincount().tolist() == [3, 3, 3]
    assert set(zip(edges["input"].tolist(), edges["upstream_unit"].tolist(), strict=True)) == {(0, 0), (4, 1), (8, 2)}


def test_groups_number_their_own_channels() -> None:
    edges = rows(random_rows(random_site(4, (3, 2), groups=2)))["edges"]
    assert set(edges["input"][edges["unit"] < 2].tolist()) == {0, 1, 2}
    assert set(edges["input"][edges["unit"] >= 2].tolist()) == {3, 4, 5}


def test_units_that_never_or_always_fire_have_no_edges() -> None:
    site = replace(random_site(3), bias_U=torch.tensor([-100.0, 0.0, 100.0], dtype=torch.float64))
    got = rows(random_rows(site))
    assert got["neurons"]["composition_total"][0].isnan()
    assert float(got["neurons"]["composition_total"][2]) == 0
    assert set(got["edges"]["unit"].tolist()) == {1}
    assert not STATISTIC.applies(replace(site, gate="identity"))


def test_the_primitive_is_template_s() -> None:
    from pipeline.statistics.template import STATISTIC as TEMPLATE

    site = random_site()
    assert STATISTIC.primitives(site)["comoment"] == TEMPLATE.primitives(site)["comoment"]
    assert STATISTIC.sample_rows == TEMPLATE.sample_rows
