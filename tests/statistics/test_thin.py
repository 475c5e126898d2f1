"""The sample of positions: the same whatever the batch, evenly spread, and memory that stays bounded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pipeline.kernels import thin
from pipeline.kernels.thin import thinned
from pipeline.sites import Presentations
from pipeline.statistics.composition import STATISTIC as COMPOSITION
from pipeline.statistics.template import STATISTIC as TEMPLATE
from tests.laws.drawn import make_presentations, make_site, reordered
from tests.statistics.compare import same_rows, state_of


def drawn(rows: int = 30, positions: int = 12, *, groups: int = 1) -> Presentations:
    generator = torch.Generator().manual_seed(0)
    site = make_site(torch.randn(4, 5, generator=generator), torch.randn(4, generator=generator), groups=groups)
    return make_presentations(site, torch.randn(rows, positions, groups, 5, generator=generator))


def taken(whole: Presentations, positions: int) -> dict[int, list[int]]:
    sample = thinned(whole, positions)
    assert sample.position_LS is not None
    return dict(zip(sample.uid_N.tolist(), sample.position_LS.tolist(), strict=True))


def test_what_is_kept_is_what_was_there() -> None:
    whole = drawn(groups=2)
    sample = thinned(whole, 5)
    assert sample.position_LS is not None
    rows = torch.arange(30)[:, None]
    for name in ("z_LSU", "a_LSU"):
        assert torch.equal(getattr(sample, name), getattr(whole, name)[rows, sample.position_LS])
    x = whole.patches(0, 30)[rows, sample.position_LS]
    assert torch.equal(sample.patches(0, 30), x)
    assert torch.equal(sample.patches(7, 9), x[7:9])
    assert torch.equal(sample.input_sums().sum_LSG, x.double().sum(-1))
    assert thinned(whole, 12) is whole


def test_the_sample_is_the_same_in_any_batch_and_order() -> None:
    whole = drawn()
    wanted = taken(whole, 5)
    half = whole.select_rows(torch.arange(30) >= 15)
    assert taken(half, 5) == {uid: wanted[uid] for uid in range(15, 30)}
    assert taken(reordered(whole, torch.randperm(30, generator=torch.Generator().manual_seed(1))), 5) == wanted


def test_positions_are_drawn_evenly_and_differ_between_rows() -> None:
    chosen = taken(drawn(600), 5)
    counts = torch.tensor(list(chosen.values())).flatten().bincount(minlength=12)
    assert counts.sum() == 600 * 5
    # 250 each, standard deviation √(600 · 5/12 · 7/12) ≈ 12
    assert ((counts - 250).abs() < 60).all()
    assert len({tuple(positions) for positions in chosen.values()}) > 300


def test_masked_positions_come_last_and_padding_changes_no_choice() -> None:
    whole = drawn()
    mask_LS = torch.arange(12) < 8
    masked = replace(whole, mask_LS=mask_LS.expand(30, 12))
    chosen = taken(masked, 5)
    assert all(max(positions) < 8 for positions in chosen.values())
    short = replace(whole, z_LSU=whole.z_LSU[:, :8], a_LSU=whole.a_LSU[:, :8])
    assert taken(short, 5) == chosen
    few = thinned(replace(whole, mask_LS=(torch.arange(12) < 3).expand(30, 12)), 5)
    assert few.mask_LS is not None
    assert few.mask_LS.sum(1).tolist() == [3] * 30


@pytest.mark.parametrize("statistic", [TEMPLATE, COMPOSITION])
def test_statistics_of_the_sample_do_not_depend_on_the_split(statistic: type) -> None:
    whole, statistic = drawn(), replace(statistic, positions=3)
    for sizes in ([30], [1] * 30, [13, 0, 17]):
        same_rows(statistic, state_of(statistic, whole, sizes), whole, atol=1e-4)


def test_patches_are_asked_for_in_bounded_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = drawn()
    asked: list[int] = []

    def patches(start: int, stop: int) -> torch.Tensor:
        asked.append(stop - start)
        return whole.patches(start, stop)

    monkeypatch.setattr(thin, "SLICE_NUMBERS", 4 * 12 * 5)
    sample = thinned(replace(whole, patches=patches), 5)
    assert sample.patches(0, 10).shape == (10, 5, 1, 5)
    assert asked == [4, 4, 2]
    assert sample.patches(3, 3).shape == (0, 5, 1, 5)
