"""How large each shape of model is, and its states: from an untrained one, before anything is trained or read.

Layer 3. An estimate for planning, which no byte of a result depends on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from pipeline.contracts import asking_of
from pipeline.errors import DataError, ModelError
from pipeline.fit.recipe import Recipe
from pipeline.flow.discover import discover
from pipeline.job_sections import SiteSelection
from pipeline.loading import PROBE_ROWS, weight_bytes
from pipeline.origins import Origin, made, made_up, shape_of, task_of
from pipeline.sites import InputSpace, Site
from pipeline.statistics.base import Statistic, primitives_digest

# outputs of a layer from which on it is looked at before it is built; the others take no longer to build
WIDE = 1 << 18


class Size(NamedTuple):
    """Bytes of one model's weights, and of its states of one chunk.

    has_no_site  whether no other rows would show a site either
    is_least     the states are of one layer alone: too many to look for the others
    """

    model: int = 0
    states: int = 0
    has_no_site: bool = False
    is_least: bool = False

    @property
    def held(self) -> int:
        """Bytes on a worker that measures it: with the states of the chunk before, while these are stored."""
        return self.model + 2 * self.states


def sizes_of(
    origins: Iterable[Origin],
    statistics: Sequence[Statistic],
    sites: SiteSelection,
    *,
    most_bytes: Mapping[str, float],
) -> dict[str, Size]:
    """The size of each shape of model, as made-up rows show its sites.

    A model that is trained is not built if the states of its widest layer alone are more than its shape's `most_bytes`.
    """
    shapes = {shape_of(origin): origin for origin in origins}
    return {shape: _size(origin, statistics, sites, most_bytes[shape]) for shape, origin in shapes.items()}


def _size(origin: Origin, statistics: Sequence[Statistic], sites: SiteSelection, most_bytes: float) -> Size:
    if isinstance(origin, Recipe) and sites == SiteSelection():
        least = _least(origin, statistics)
        if least.states > most_bytes:
            return least
    try:
        model, rows = made(origin), made_up(origin, PROBE_ROWS)
        found = discover(model, rows, include=sites.include, exclude=sites.exclude, rows=sites.rows, may_draw=False)
    except (ModelError, DataError):
        # it will be said of every such model, and stops none of the others
        return Size()
    outputs = task_of(origin).outputs
    states = sum(_state_bytes(statistic, site, outputs) for site in found.sites for statistic in statistics)
    return Size(weight_bytes(model), states, has_no_site=not found.sites and not found.idle)


def _least(recipe: Recipe, statistics: Sequence[Statistic]) -> Size:
    """What is known of a model without its numbers: 100 million units take minutes and all memory to look at."""
    with torch.device("meta"):
        module = recipe.build()
    widest = max((one for one in module.modules() if isinstance(one, nn.Linear)), key=_outputs, default=None)
    if widest is None or widest.out_features < WIDE:
        return Size()
    # of a gated pair in one layer two outputs are one unit
    pattern_UD = torch.empty(widest.out_features // 2, widest.in_features, device="meta")
    inputs = InputSpace("features", (widest.in_features,))
    site = Site("widest", "", 0, 0, "dense", "identity", pattern_UD, pattern_UD[:, 0], pattern_UD, inputs)
    states = sum(_state_bytes(statistic, site, recipe.outputs) for statistic in statistics)
    return Size(weight_bytes(module), states, is_least=True)


def _outputs(layer: nn.Linear) -> int:
    return layer.out_features


def _state_bytes(statistic: Statistic, site: Site, outputs: int) -> int:
    """Bytes of a statistic's state of a site, 0 where it does not apply; ContractError if it cannot say."""
    with asking_of(statistic, "asked", site):
        primitives_digest(statistic, [site])
        return statistic.state_bytes(site, outputs) if statistic.applies(site) else 0
