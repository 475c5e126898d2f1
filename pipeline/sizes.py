"""How large each shape of model is, and its states: from an untrained one, before anything is trained or read.

Layer 3. An estimate for planning, which no byte of a result depends on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pipeline.contracts import raised_by
from pipeline.errors import DataError, ModelError
from pipeline.flow.discover import discover
from pipeline.job_sections import SiteSelection
from pipeline.loading import PROBE_ROWS, weight_bytes
from pipeline.origins import Origin, made, made_up, shape_of, task_of
from pipeline.sites import Site
from pipeline.statistics.base import Statistic, primitives_digest


class Size(NamedTuple):
    """Bytes of one model's weights, and of its states of one chunk; whether no other rows would show a site either."""

    model: int = 0
    states: int = 0
    has_no_site: bool = False

    @property
    def held(self) -> int:
        """Bytes on a worker that measures it: with the states of the chunk before, while these are stored."""
        return self.model + 2 * self.states


def sizes_of(origins: Iterable[Origin], statistics: Sequence[Statistic], sites: SiteSelection) -> dict[str, Size]:
    """The size of each shape of model, as made-up rows show its sites."""
    shapes = {shape_of(origin): origin for origin in origins}
    return {shape: _size(origin, statistics, sites) for shape, origin in shapes.items()}


def _size(origin: Origin, statistics: Sequence[Statistic], sites: SiteSelection) -> Size:
    try:
        model, rows = made(origin), made_up(origin, PROBE_ROWS)
        found = discover(model, rows, include=sites.include, exclude=sites.exclude, rows=sites.rows)
    except (ModelError, DataError):
        # it will be said of every such model, and stops none of the others
        return Size()
    outputs = task_of(origin).outputs
    states = sum(_state_bytes(statistic, site, outputs) for site in found.sites for statistic in statistics)
    return Size(weight_bytes(model), states, has_no_site=not found.sites and not found.idle)


def _state_bytes(statistic: Statistic, site: Site, outputs: int) -> int:
    """Bytes of a statistic's state of a site, 0 where it does not apply; ContractError if it cannot say."""
    try:
        primitives_digest(statistic, [site])
        return statistic.state_bytes(site, outputs) if statistic.applies(site) else 0
    except Exception as error:
        raise raised_by(type(statistic).__module__, error, doing=f"asked of site {site.name}") from error
