"""Match against NumPy's correlation and scikit-learn's AUROC; where it is undefined; a convolution's border."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch.nn import functional

from pipeline.kernels import matchbins
from pipeline.kernels.match import match
from pipeline.kernels.matchbins import InputNorm, MatchBins
from pipeline.statistics.base import Controls
from pipeline.statistics.match import STATISTIC
from tests.laws.drawn import input_sums, make_presentations, make_site


def shown(rows: int = 200, fan_in: int = 20, units: int = 4, shift: float = 0.0, seed: int = 0):
    random = np.random.default_rng(seed)
    site = make_site(random.normal(size=(units, fan_in)) + shift, random.normal(size=units))
    return make_presentations(site, random.normal(size=(rows, fan_in)) + shift, dtype=torch.float64)


@pytest.mark.parametrize("shift", [0.0, 10.0])
def test_both_forms_are_those_of_numpy(shift: float) -> None:
    given = shown(shift=shift)
    x, w = given.patches(0, 200)[:, 0, 0].numpy(), given.site.pattern_UD.numpy()
    sums = given.input_sums()
    correlation = match(given.site, "pearson", given.z_LSU, sums)
    cosine = match(given.site, "cosine", given.z_LSU, sums)
    wanted = np.corrcoef(np.concatenate([x, w]))[:200, 200:]
    np.testing.assert_allclose(correlation.value[:, 0], wanted, atol=1e-10)
    wanted = (x @ w.T) / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(w, axis=1)
    np.testing.assert_allclose(cosine.value[:, 0], wanted, atol=1e-12)
    assert correlation.defined is None
    assert cosine.defined is None


def test_undefined_is_counted_apart_and_never_zero() -> None:
    site = make_site([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [5.0, 5.0, 5.0]])
    given = make_presentations(site, [[0.0, 0.0, 0.0], [0.1, 0.1, 0.1], [3.0, 2.0, 1.0]])
    rows = STATISTIC.columns(site, STATISTIC.observe(given), Controls())["neurons"]
    assert rows["pearson_undefined"].tolist() == [2, 3, 3]
    assert rows["cosine_undefined"].tolist() == [1, 3, 1]
    assert rows["pearson_n"].tolist() == [1, 0, 0]
    assert rows["pearson_mean"].isnan().tolist() == [False, True, True]


def test_two_inputs_have_no_correlation() -> None:
    given = shown(fan_in=2)
    assert MatchBins("pearson").observe(given)["undefined"].tolist() == [200] * 4
    assert MatchBins("cosine").observe(given)["undefined"].tolist() == [0] * 4


@pytest.mark.parametrize(("fan_in", "noise"), [(5, 0.0), (30, 1.0), (4608, 0.0), (4608, 30.0)])
def test_auroc_is_that_of_sklearn_within_its_bound(fan_in: int, noise: float) -> None:
    given = shown(rows=400, fan_in=fan_in, units=2, seed=fan_in)
    value = match(given.site, "pearson", given.z_LSU, given.input_sums()).value[:, 0].numpy()
    z_LSU = given.z_LSU + noise * torch.randn(given.z_LSU.shape, generator=torch.Generator().manual_seed(0))
    given = make_presentations(
        given.site, given.patches(0, 400), z_LSU=z_LSU, affine_LSU=given.z_LSU, dtype=torch.float64
    )
    rows = STATISTIC.columns(given.site, STATISTIC.observe(given), Controls())["neurons"]
    for unit in range(2):
        exact = roc_auc_score(z_LSU[:, 0, unit] > 0, value[:, unit])
        bound = float(rows["pearson_auroc_bound"][unit])
        assert abs(float(rows["pearson_auroc"][unit]) - exact) <= bound + 1e-12
        assert bound < 0.02


def test_half_is_where_firing_becomes_likelier() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(4000, 3))
    x /= np.linalg.norm(x, axis=1)[:, None]
    # ‖x‖ = ‖w‖ = 1 and z = cos − ½: the threshold is at a cosine of ½ exactly
    site = make_site([[1.0, 0.0, 0.0]], [-0.5])
    given = make_presentations(site, x, dtype=torch.float64)
    rows = STATISTIC.columns(site, STATISTIC.observe(given), Controls())["neurons"]
    assert float(rows["cosine_half"]) == pytest.approx(0.5)
    assert float(rows["tau"]) == pytest.approx(0.5)
    assert float(rows["cosine_auroc"]) == pytest.approx(1.0, abs=0.01)


def test_bins_span_one_in_rising_order() -> None:
    edges = matchbins.edges()
    assert len(edges) == matchbins.BINS + 1
    assert (edges.diff() > 0).all()
    assert edges[[0, -1]].tolist() == [-1, 1]
    assert float(edges[matchbins.SIDE + 1]) == 2.0**-12


def test_ends_and_zero_have_their_bins() -> None:
    # x = w, −w, and at a right angle to it
    site = make_site([[3.0, 4.0, 0.0]])
    given = make_presentations(site, [[3.0, 4.0, 0.0], [-3.0, -4.0, 0.0], [-4.0, 3.0, 0.0]], dtype=torch.float64)
    count = MatchBins("cosine").observe(given)
    total = (count["fired_count"] + count["silent_count"])[0]
    assert total.nonzero()[:, 0].tolist() == [0, matchbins.SIDE, matchbins.BINS - 1]


def test_a_border_of_padding_does_not_lower_the_match() -> None:
    # every patch is the pattern as far as the image reaches: at the border x is shorter, not less alike
    weight = torch.ones(1, 1, 3, 3, dtype=torch.float64)
    image = torch.ones(1, 1, 5, 5, dtype=torch.float64)
    z = functional.conv2d(image, weight, padding=1).flatten(2).transpose(1, 2)
    x = functional.unfold(image, 3, padding=1).transpose(1, 2)[:, :, None]
    site = make_site(weight.flatten(1))
    given = make_presentations(site, x, z_LSU=z, dtype=torch.float64)
    norm = input_sums(x).square_LSG.sqrt().view(5, 5)
    assert norm[2, 2] > norm[0, 2] > norm[0, 0]
    value = match(site, "cosine", given.z_LSU, given.input_sums()).value.view(5, 5)
    # cos = √(part of the patch inside the image)
    np.testing.assert_allclose(value, (norm / 3), rtol=1e-12)


def test_groups_read_their_own_inputs() -> None:
    random = np.random.default_rng(0)
    site = make_site(random.normal(size=(4, 6)), groups=2)
    x = random.normal(size=(50, 1, 2, 6))
    x[:, :, 1] *= 100
    given = make_presentations(site, x, dtype=torch.float64)
    norms = InputNorm().observe(given)
    np.testing.assert_allclose(norms["mean"], np.linalg.norm(x, axis=-1).mean((0, 1)), rtol=1e-12)
    rows = STATISTIC.columns(site, STATISTIC.observe(given), Controls())["neurons"]
    wanted = [np.mean([np.corrcoef(row[0, u // 2], site.pattern_UD[u])[0, 1] for row in x]) for u in range(4)]
    np.testing.assert_allclose(rows["pearson_mean"], wanted, rtol=1e-10)
