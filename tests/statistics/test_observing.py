"""A statistic that makes its states by itself: their size is known before there are any, and others are told apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from pipeline.cells import misfit
from pipeline.kernels.base import Primitive, State
from pipeline.registry import statistics
from pipeline.sites import Presentations, Site
from pipeline.statistics.base import Controls, Rows, Statistic
from tests.laws.drawn import Recipe, draw, make_site
from tests.laws.laws import LAWS
from tests.laws.test_laws import NAMED

RESPONSE = statistics()["response"]


@dataclass(frozen=True)
class Alone(Statistic):
    """Response, of which no primitive is known."""

    name = "alone"
    version = 1
    COLUMNS = RESPONSE.COLUMNS

    def primitives(self, site: Site) -> Mapping[str, Primitive]:
        return {}

    def empty(self, site: Site) -> State:
        return RESPONSE.empty(site)

    def observe(self, presentations: Presentations) -> State:
        return RESPONSE.observe(presentations)

    def merge(self, site: Site, left: State, right: State) -> State:
        return RESPONSE.merge(site, left, right)

    def columns(self, site: Site, state: State, controls: Controls) -> Rows:
        return RESPONSE.columns(site, state, controls)

    def define(self, site: Site, whole: Presentations, controls: Controls) -> Rows:
        return RESPONSE.define(site, whole, controls)


class Started(Alone):
    """Begins with numbers of the site, which there are none of without memory."""

    def empty(self, site: Site) -> State:
        start_U = torch.from_numpy(np.full(site.units, float(site.bias_U.abs().max()) * 0))
        return {**super().empty(site), "start": start_U + site.bias_U * float(torch.zeros(1).item())}


@pytest.mark.parametrize("law", sorted(LAWS))
def test_it_keeps_the_laws(law: str) -> None:
    for name in ("plain", "empty", "grouped", "not finite"):
        recipe = NAMED[name]
        LAWS[law](Alone(), draw(recipe), np.random.default_rng(recipe.seed))


def test_its_states_are_as_large_as_they_are() -> None:
    site = make_site(np.ones((7, 3)))
    assert Alone().state_bytes(site) == RESPONSE.state_bytes(site) > 7 * 100
    assert Started().state_bytes(site) == RESPONSE.state_bytes(site) + 7 * 8


def test_no_state_is_made_to_know_its_size() -> None:
    pattern_UD = torch.empty(10**9, 3, device="meta")
    site = replace(make_site(np.ones((7, 3))), pattern_UD=pattern_UD, bias_U=pattern_UD[:, 0], raw_UD=pattern_UD)
    assert Alone().state_bytes(site) == RESPONSE.state_bytes(site) > 10**11


def test_a_state_of_another_kind_is_told_apart() -> None:
    shown, other = draw(Recipe(0)), draw(Recipe(0, units=4))
    assert misfit(RESPONSE.observe(shown), *Alone().forms(shown.site)) is None
    assert "not" in str(misfit(RESPONSE.observe(other), *Alone().forms(shown.site)))
    assert "belong" in str(misfit({}, *Alone().forms(shown.site)))
