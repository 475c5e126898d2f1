"""composition: which inputs carry what fires a unit, so that patterns can be read as patterns of patterns.

Layer 2: pure torch, no I/O. A unit's mean pre-activation when it fires exceeds its mean pre-activation by exactly
w·(E[x | fires] − E[x]): the terms of that product are the inputs' contributions. It asks for the primitive that
template asks for, so one pass serves both; only the state is stored twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from pipeline.columns import Column, DType
from pipeline.kernels.base import Primitive, State
from pipeline.kernels.comoment import CoMoment
from pipeline.kernels.whole import Array, Whole
from pipeline.sites import Presentations, Site
from pipeline.statistics.base import Controls, Rows, Statistic, Values, at_least, part

# of a unit's largest contribution: contributions that differ by less are equal, products are taken in float32
TIE = 2.0**-16
FLOATS = frozenset({"contribution", "share"})


def _edge(
    name: str, dtype: DType, meaning: str, formula: str, *, null: str = "never", unit: str = "1", range: str = "any"
) -> Column:
    return Column(name, dtype, meaning, unit=unit, range=range, null=null, formula=formula, table="edges")


@dataclass(frozen=True)
class Composition(Statistic):
    """Contributions of input channels to the rise of z when a unit fires.

    positions   as template's, whose primitive this is
    top         how many inputs of each unit are listed in the table of edges
    """

    sample_rows: int | None = 20_000
    positions: int = at_least(1, 2**30)
    top: int = at_least(1, 8)

    name: ClassVar[str] = "composition"
    version: ClassVar[int] = 4
    COLUMNS: ClassVar[tuple[Column, ...]] = (
        Column(
            "composition_total",
            "float64",
            "By how much w·x + b is higher on average when the unit fires: what all contributions add up to.",
            unit="z",
            null="null where firing is undefined (no gate); NaN where the unit never fires",
            formula="Σ_i contribution_i = w·(E[x | z > 0] − E[x]) = E[w·x + b | z > 0] − E[w·x + b]",
            se=True,
        ),
        _edge(
            "rank",
            "int32",
            "Place of the input among the unit's, by size of contribution, from 0; none of a unit that never or always "
            "fires.",
            f"by falling |contribution|, those within {TIE:.0e} of the largest by input",
            range="≥ 0",
        ),
        _edge(
            "input",
            "int32",
            "Number of the input: a convolution's channel, an embedding's field, the first of an upstream unit.",
            "c of w_c…, groups one after the other",
            range="≥ 0",
        ),
        _edge(
            "upstream",
            "string",
            "Site whose unit that input is.",
            "by following the data flow: elementwise, pooling, flatten",
            null="null where the data flow is no single unit's (a sum, data)",
        ),
        _edge(
            "upstream_unit",
            "int32",
            "Unit of that site.",
            "by following the data flow",
            null="null where upstream is null",
            unit="unit",
            range="≥ 0",
        ),
        _edge(
            "contribution",
            "float64",
            "What the input adds to the rise of z when the unit fires; negative if it holds it back.",
            "w_i (E[x_i | z > 0] − E[x_i]), summed over the positions of a kernel",
            unit="z",
        ),
        _edge(
            "share",
            "float64",
            "Its share of the sum over all inputs; may be negative or exceed 1.",
            "contribution / composition_total",
            null="NaN where the sum is 0",
        ),
    )

    def applies(self, site: Site) -> bool:
        """Where a unit can fire."""
        return site.fires

    def primitives(self, site: Site) -> Mapping[str, Primitive]:
        """The co-moments of firing with x, together with those of a: template's, so that they are computed once."""
        return {"comoment": CoMoment(fired=True, positions=self.positions)}

    def rows_together(self, site: Site) -> int:
        """Each unit alone."""
        return 1

    def columns(self, site: Site, state: State, controls: Controls) -> Rows:
        """The sum of contributions, and the largest as edges."""
        seen = part(state, "comoment")
        terms_UD = site.pattern_UD * seen["fired_UD"] / seen["n_fired_U"][:, None]
        total_U = terms_UD.sum(-1)
        sources = _sources(site)
        contribution_UI = torch.zeros((site.units, sources.total), dtype=torch.float64)
        contribution_UI.index_add_(1, sources.source_D, terms_UD)
        return {"neurons": {"composition_total": total_U}, "edges": self._edges(site, contribution_UI, total_U)}

    def define(self, site: Site, whole: Presentations, controls: Controls) -> Rows:
        """The contributions from all presentations at once, unit by unit in float64."""
        seen = Whole(whole, self.positions)
        totals: list[float] = []
        edges: list[dict[str, Any]] = []
        for unit, group in enumerate(site.group_U.tolist()):
            keep = seen.valid_PU[:, unit] & np.isfinite(seen.x_PGD[:, group]).all(-1)
            terms_D = _defined_terms(site.pattern_UD[unit].numpy(), seen.x_PGD[keep, group], seen.z_PU[keep, unit] > 0)
            totals.append(float(terms_D.sum()))
            edges += [{"unit": unit, **edge} for edge in _defined_edges(site, group, terms_D, self.top)]
        columns: dict[str, Values] = {
            name: torch.tensor([edge[name] for edge in edges], dtype=torch.float64 if name in FLOATS else torch.int64)
            for name in ("unit", "rank", "input", "contribution", "share")
        }
        if site.inputs.upstream_unit:
            columns["upstream"] = [edge["upstream"] for edge in edges]
            columns["upstream_unit"] = torch.tensor([edge["upstream_unit"] for edge in edges], dtype=torch.int64)
        return {"neurons": {"composition_total": torch.tensor(totals, dtype=torch.float64)}, "edges": columns}

    def _edges(self, site: Site, contribution_UI: torch.Tensor, total_U: torch.Tensor) -> dict[str, Values]:
        """The `top` inputs of each unit that fires at some presentations and not at all, ties to the lowest."""
        sources = _sources(site)
        size_UI = contribution_UI.abs()
        largest_U1 = size_UI.amax(-1, keepdim=True)
        order_UI = (size_UI / largest_U1 / TIE).round().sort(dim=-1, descending=True, stable=True).indices
        order_UK = order_UI[:, : self.top]
        unit_E = (largest_U1[:, 0] > 0).nonzero()[:, 0].repeat_interleave(order_UK.shape[1])
        rank_E = torch.arange(order_UK.shape[1]).repeat(int((largest_U1 > 0).sum()))
        source_E = order_UK[unit_E, rank_E]
        contribution_E = contribution_UI[unit_E, source_E]
        edges: dict[str, Values] = {
            "unit": unit_E,
            "rank": rank_E,
            "input": sources.channel_GI[site.group_U[unit_E], source_E],
            "contribution": contribution_E,
            "share": contribution_E / total_U[unit_E].masked_fill(total_U[unit_E] == 0, torch.nan),
        }
        if sources.upstream_GI is not None:
            upstream = sources.upstream_GI[site.group_U[unit_E], source_E]
            edges["upstream"] = [site.inputs.upstream[index] for index in upstream[:, 0].tolist()]
            edges["upstream_unit"] = upstream[:, 1]
        return edges


class _Sources(NamedTuple):
    """Which of I sources each of a unit's D numbers belongs to, and per group the sources' channels and units."""

    total: int
    source_D: torch.Tensor
    channel_GI: torch.Tensor
    upstream_GI: torch.Tensor | None


def _sources(site: Site) -> _Sources:
    """The channels of a pattern, or the upstream units where several channels are one unit's (after a flatten)."""
    fan_in, groups = site.fan_in, site.groups
    # a dense layer over pixels or lags has no kernel: each of its inputs is one by itself
    has_blocks = site.kind.startswith("conv") or site.inputs.kind in ("units", "embeddings")
    channels = site.inputs.shape[0] if has_blocks else fan_in
    upstream = torch.tensor(site.inputs.upstream_unit, dtype=torch.int64).view(-1, 2)
    if len(upstream) == fan_in and groups == 1:
        pairs, source_D = upstream.unique(dim=0, return_inverse=True)
        first_I = torch.full((len(pairs),), fan_in).scatter_reduce(0, source_D, torch.arange(fan_in), "amin")
        order_I = first_I.argsort()
        return _Sources(len(pairs), order_I.argsort()[source_D], first_I[order_I][None], pairs[order_I][None])
    source_D = torch.arange(channels).repeat_interleave(fan_in // channels)
    channel_GI = torch.arange(channels * groups).view(groups, channels)
    return _Sources(
        channels, source_D, channel_GI, upstream[channel_GI] if len(upstream) == channels * groups else None
    )


def _defined_terms(w_D: Array, x_PD: Array, fires_P: Array) -> Array:
    """w_i (E[x_i | fires] − E[x_i]); NaN for a unit that never fires."""
    if not fires_P.any():
        return np.full(len(w_D), np.nan)
    x_PD = x_PD - x_PD[0]
    return w_D * (0 if fires_P.all() else x_PD[fires_P].mean(0) - x_PD.mean(0))


def _defined_edges(site: Site, group: int, terms_D: Array, top: int) -> list[dict[str, Any]]:
    """Contributions added up by channel, or by upstream unit where one has several inputs; the largest first."""
    fan_in, wired = len(terms_D), site.inputs.upstream_unit
    per_input = len(wired) == fan_in and site.groups == 1
    kernel = site.kind.startswith("conv") or site.inputs.kind in ("units", "embeddings")
    size = fan_in // site.inputs.shape[0] if kernel else 1
    sums: dict[Any, float] = {}
    first: dict[Any, int] = {}
    for number, term in enumerate(terms_D.tolist()):
        channel = group * (fan_in // size) + number // size
        source = wired[number] if per_input else channel
        sums[source] = sums.get(source, 0.0) + term
        first.setdefault(source, number if per_input else channel)
    largest = max(map(abs, sums.values()))
    if not largest > 0:
        return []
    ranked = sorted(sums, key=lambda source: -round(abs(sums[source]) / largest / TIE))[:top]
    edges = []
    for rank, source in enumerate(ranked):
        edge = {"rank": rank, "input": first[source], "contribution": sums[source]}
        edge["share"] = sums[source] / total if (total := float(terms_D.sum())) else np.nan
        if wired:
            place, unit = source if per_input else wired[source]
            edge |= {"upstream": site.inputs.upstream[place], "upstream_unit": unit}
        edges.append(edge)
    return edges


STATISTIC = Composition()
