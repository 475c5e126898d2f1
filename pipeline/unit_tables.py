"""The tables of one model's units on one split, as Arrow: what the statistics say of their states, site by site.

Layer 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import torch

from pipeline.columns import Column
from pipeline.contracts import asking_of
from pipeline.declared import refuse_unfit_rows
from pipeline.flow.discover import Discovery
from pipeline.kernels.base import State
from pipeline.running import States
from pipeline.sites import Site
from pipeline.statistics.base import Controls, Statistic
from pipeline.tables import arrow_table, table_columns


def controls_of(discovery: Discovery, twin: Discovery | None) -> dict[str, Controls]:
    """What stands beside each site's numbers: the same site of the untrained twin, where it has the same shape."""
    twins = {site.name: site for site in twin.sites} if twin else {}
    return {site.name: Controls(twin=_comparable(site, twins.get(site.name))) for site in discovery.sites}


def _comparable(site: Site, other: Site | None) -> Site | None:
    return other if other is not None and site.pattern_UD.shape == other.pattern_UD.shape else None


def unit_columns(statistics: Sequence[Statistic]) -> dict[str, tuple[Column, ...]]:
    """The columns of every table with those of the statistics."""
    return table_columns([replace(column, version=one.version) for one in statistics for column in one.COLUMNS])


def arrow_tables(
    discovery: Discovery,
    states: States,
    statistics: Sequence[Statistic],
    *,
    keys: Mapping[str, str],
    controls: Mapping[str, Controls],
    errors: Mapping[str, Mapping[str, torch.Tensor]] = MappingProxyType({}),
) -> dict[str, pa.Table]:
    """The tables of units of one model on one split, sorted by site, the columns of `keys` in front.

    `errors` holds further columns of `neurons` by site: the standard errors.
    """
    columns = unit_columns(statistics)
    parts: dict[str, list[pa.Table]] = {}
    for site in sorted(discovery.sites, key=lambda one: one.name):
        given = {one.name: states[one.name][site.name] for one in statistics if one.applies(site)}
        for table, values in _site_rows(site, given, statistics, controls[site.name]):
            more = errors.get(site.name, {}) if table == "neurons" else {}
            rows = {**keys, "site": site.name, **values, **more}
            parts.setdefault(table, []).append(arrow_table(table, columns[table], rows))
    return {table: pa.concat_tables(of_sites) for table, of_sites in sorted(parts.items())}


def _site_rows(
    site: Site, states: Mapping[str, State], statistics: Sequence[Statistic], controls: Controls
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Tables with column → values of one site: the units' one row each, then what each statistic adds elsewhere."""
    neurons: dict[str, Any] = {"unit": torch.arange(site.units)}
    others: list[tuple[str, dict[str, Any]]] = []
    for statistic in statistics:
        if statistic.name in states:
            with asking_of(statistic, "columns()", site):
                given = statistic.columns(site, states[statistic.name], controls)
            refuse_unfit_rows(statistic, site, given)
            for table, columns in given.items():
                if table == "neurons":
                    neurons.update(columns)
                else:
                    others.append((table, dict(columns)))
    yield "neurons", neurons
    yield from others
