"""The law of parts finds what compares units, in any column or table; the statistics here keep it wherever one ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from pipeline.columns import Column
from pipeline.kernels import vectors
from pipeline.kernels.base import Primitive, State
from pipeline.kernels.moments import Moments
from pipeline.registry import statistics
from pipeline.sites import Presentations, Site
from pipeline.statistics.base import Controls, Rows, Statistic, part
from tests.laws.drawn import Recipe, draw
from tests.laws.laws import LAWS


def own(site: Site, max_U: torch.Tensor) -> Rows:
    unit_E = torch.arange(site.units).repeat_interleave(2)
    return {"neurons": {"share": max_U}, "pairs": {"unit": unit_E, "side": unit_E.new_tensor([0, 1] * site.units)}}


def compared(site: Site, max_U: torch.Tensor) -> Rows:
    return {**own(site, max_U), "neurons": {"share": max_U / max_U.max()}}


def compared_in_a_table(site: Site, max_U: torch.Tensor) -> Rows:
    return {**own(site, max_U), "pairs": {"unit": torch.arange(site.units), "side": max_U.argsort()}}


def one_side_after_the_other(site: Site, max_U: torch.Tensor) -> Rows:
    unit_E = torch.arange(site.units).repeat(2)
    return {**own(site, max_U), "pairs": {"unit": unit_E, "side": torch.arange(2).repeat_interleave(site.units)}}


def of_the_first_alone(site: Site, max_U: torch.Tensor) -> Rows:
    return {"neurons": own(site, max_U)["neurons"]} if site.whole and site.first else own(site, max_U)


@dataclass(frozen=True)
class Share(Statistic):
    """Says of its units whatever it is given; that they are each other's business it does not say."""

    made: Callable[[Site, torch.Tensor], Rows] = own

    name = "share"
    version = 1
    COLUMNS = (
        Column("share", "float64", "The greatest z."),
        Column("side", "int64", "Either of two.", table="pairs"),
    )

    def primitives(self, site: Site) -> Mapping[str, Primitive]:
        return {"z": Moments("z", 2)}

    def rows_together(self, site: Site) -> int:
        return 1

    def columns(self, site: Site, state: State, controls: Controls) -> Rows:
        return self.made(site, part(state, "z")["max"])

    def define(self, site: Site, whole: Presentations, controls: Controls) -> Rows:
        raise NotImplementedError


def keeps_the_law(statistic: Statistic, recipe: Recipe) -> None:
    for seed in range(5):
        LAWS["parts"](statistic, draw(replace(recipe, seed=seed)), np.random.default_rng(seed))


@pytest.mark.parametrize("units", [3, 40])
def test_what_compares_units_is_found(units: int) -> None:
    recipe = Recipe(0, rows=20, units=units)
    keeps_the_law(Share(), recipe)
    for made in (compared, compared_in_a_table, one_side_after_the_other, of_the_first_alone):
        with pytest.raises(AssertionError, match=r"neurons|pairs"):
            keeps_the_law(Share(made=made), recipe)


def test_a_part_may_end_among_the_last_units(monkeypatch: pytest.MonkeyPatch) -> None:
    # as one of 3,547 does, which is cut at multiples of 1,182: its last units are fewer than those compared at once
    monkeypatch.setattr(vectors, "BLOCK_NUMBERS", 96)
    statistic = replace(statistics()["template"], whitened_fan_in=0)
    assert statistic.rows_together(draw(Recipe(0, units=40)).site) == 2
    keeps_the_law(statistic, Recipe(0, rows=20, units=40))
