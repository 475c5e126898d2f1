"""template: does the data that drives a unit look like its weights? S = Cov(a, x) and E[x | fires] − E[x] beside w.

Layer 2: pure torch, no I/O. The weights of a trained unit are proportional to what makes its activation vary
(Radhakrishnan et al., Science 2024: the neural feature ansatz) only where training has put them there, so every cosine
stands beside the same with the patterns of the other units and with the unit's own pattern permuted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch.nn.functional import pad

from pipeline.columns import Column
from pipeline.hashing import splitmix64
from pipeline.kernels.base import Primitive, State
from pipeline.kernels.comoment import CoMoment, InputCovariance
from pipeline.kernels.vectors import block_rows, cosine, cosine_blocks, permutations
from pipeline.kernels.whole import Array, Whole
from pipeline.sites import Presentations, Site
from pipeline.statistics.base import Controls, Rows, Statistic, Values, at_least, part

# with 100 permutations the 95th percentile is the fifth largest: its own spread is a tenth of the null's
PERMUTATIONS = 100
# numbers of the patterns that are permuted at once, 8 MiB of float64
PERMUTED_NUMBERS = 1 << 20
# a sum over rows takes other steps in the last few columns: in columns by so many it takes the same ones
ABREAST = 64
# of the mean variance of an input; digits have inputs that never vary, so Σ alone has no inverse
RIDGE = 1e-3
# of sd(a)·sd(x): a smaller co-moment is chance in 10⁸ presentations and loses its digits in float32 products
RESOLUTION = 2.0**-14
_ORDERS = "π number s orders the D entries by row_hash(entry, seed = s), as pipeline.hashing defines it"
_ANSATZ = "Radhakrishnan et al. 2024, Science 383:1461"


def _column(name: str, meaning: str, formula: str, null: str, *, source: str = "", se: bool = False) -> Column:
    return Column(name, "float64", meaning, range="[-1, 1]", null=null, formula=formula, source=source, se=se)


def _absolute(name: str, meaning: str, formula: str, null: str) -> Column:
    return Column(name, "float64", meaning, range="[0, 1]", null=null, formula=formula)


def _pattern(name: str, meaning: str, formula: str, null: str = "never", unit: str = "z per x") -> Column:
    return Column(name, "list<float32>", meaning, unit=unit, formula=formula, null=null, table="patterns")


_UNRESOLVED = "NaN where a or x does not vary, or S is below float32's resolution, or w = 0"
_NO_OTHER = f"null where the unit shares its inputs with no other; {_UNRESOLVED}"


@dataclass(frozen=True)
class Template(Statistic):
    """Cov(a, x) and the mean of what fires a unit, compared with its pattern.

    positions         of each row at most this many positions, drawn by hash (default: all)
    whitened_fan_in   the whitened form is computed where the fan-in is at most this: its state has fan-in² numbers
    """

    sample_rows: int | None = 20_000
    positions: int = at_least(1, 2**30)
    whitened_fan_in: int = at_least(0, 1024)

    name: ClassVar[str] = "template"
    version: ClassVar[int] = 4
    COLUMNS: ClassVar[tuple[Column, ...]] = (
        Column(
            "template_n",
            "int64",
            "Presentations that the template columns rest on (of the sample of rows; finite and unmasked).",
            unit="presentations",
            range="≥ 0",
            formula="#(x, z and a finite)",
        ),
        _column(
            "template_cos",
            "Does what drives the unit look like its weights: cosine of S = Cov(a, x) with the pattern w.",
            "S·w / (‖S‖‖w‖), S = Σ(a − ā)(x − x̄)/n",
            _UNRESOLVED,
            source=_ANSATZ,
            se=True,
        ),
        _absolute(
            "template_cos_other_mean",
            "Control: mean |cosine| of the unit's S with the patterns of the other units over the same inputs.",
            "mean over v ≠ u of |cos(S_u, w_v)|",
            _NO_OTHER,
        ),
        _absolute(
            "template_cos_other_p95",
            "Control: 95th percentile of |cosine| of the unit's S with the other units' patterns.",
            "0.95 quantile over v ≠ u of |cos(S_u, w_v)|, linearly interpolated",
            _NO_OTHER,
        ),
        _column(
            "template_cos_other_signed",
            "Control: mean signed cosine of the unit's S with the other units' patterns; 0 if they point anywhere.",
            "mean over v ≠ u of cos(S_u, w_v)",
            _NO_OTHER,
        ),
        _absolute(
            "template_cos_permuted_mean",
            "Control: mean |cosine| of S with the unit's own pattern, its entries permuted.",
            f"mean over {PERMUTATIONS} fixed permutations π of |cos(S, w∘π)|; {_ORDERS}",
            _UNRESOLVED,
        ),
        _absolute(
            "template_cos_permuted_p95",
            "Control: 95th percentile of |cosine| of S with the unit's own pattern, its entries permuted.",
            f"0.95 quantile over {PERMUTATIONS} fixed permutations π of |cos(S, w∘π)|; {_ORDERS}",
            _UNRESOLVED,
        ),
        _column(
            "template_cos_sta",
            "Does the mean of what fires the unit look like its weights: cosine of E[x | fires] − E[x] with w.",
            "cos(E[x | z > 0] − E[x], w)",
            "null where firing is undefined (no gate); NaN where it fires never or always, x does not vary, the "
            "difference is below float32's resolution, or w = 0",
            source="spike-triggered average: de Boer & Kuyper 1968; Chichilnisky 2001",
            se=True,
        ),
        _column(
            "template_cos_whitened",
            "The cosine after undoing the correlations of the inputs: 1 for Gaussian x whatever the gate.",
            f"cos((Σ + λI)⁻¹S, w), Σ = Cov(x), λ = {RIDGE} · tr Σ / D",
            f"null where fan-in > whitened_fan_in, or there is no gate (then 1 by construction); {_UNRESOLVED}",
            source="Stein's lemma: S = E[φ′]Σw for Gaussian x",
        ),
        _pattern("weight", "The unit's pattern w, norms folded in; reshape by the site's input_shape.", "w"),
        Column("bias", "float64", "The unit's effective bias.", unit="z", formula="b", table="patterns"),
        _pattern(
            "raw_weight", "The weights before a norm was folded in.", "w before folding", "null where nothing is folded"
        ),
        _pattern(
            "up_weight",
            "Of a gated pair the pattern of the other branch.",
            "w of the other branch",
            "null where the unit is no pair",
        ),
        _pattern(
            "cov",
            "Cov(a, x), what makes the activation vary; 0 below float32's resolution.",
            "S",
            "NaN where nothing was seen",
            unit="a·x",
        ),
        _pattern(
            "sta",
            "Mean of the inputs that fire the unit, less the mean of all inputs.",
            "E[x | z > 0] − E[x]",
            "null where firing is undefined (no gate); NaN where it never fires",
            unit="x",
        ),
        _pattern("mean_x", "Mean of the unit's inputs.", "E[x]", "NaN where nothing was seen", unit="x"),
    )

    def primitives(self, site: Site) -> Mapping[str, Primitive]:
        """Co-moments of a and firing with x, and the inputs' covariance where it is small enough."""
        needed: dict[str, Primitive] = {"comoment": CoMoment(fired=site.fires, positions=self.positions)}
        if self._whitened(site):
            needed["inputs"] = InputCovariance(self.positions)
        return needed

    def rows_together(self, site: Site) -> int:
        """A block of cosines with the other units; all where the whitened form is solved for all at once."""
        return site.units if self._whitened(site) else block_rows(site.units)

    def columns(self, site: Site, state: State, controls: Controls) -> Rows:
        """Cosines, their nulls, and the patterns themselves."""
        seen = _from_state(site, part(state, "comoment"))
        neurons: dict[str, Values] = {
            "template_n": seen.n_U,
            **_own_cosines(site, seen),
            **_permuted_cosines(site, seen.cov_UD),
            **_other_cosines(site, seen.cov_UD),
        }
        if self._whitened(site):
            inputs = part(state, "inputs")
            sigma_GDD = inputs["m2_GDD"] / inputs["n_G"][:, None, None]
            neurons["template_cos_whitened"] = cosine(_whitened(seen.cov_UD, sigma_GDD), site.pattern_UD)
        return {"neurons": neurons, "patterns": _patterns(site, seen)}

    def estimates(self, site: Site, state: State, controls: Controls) -> Mapping[str, Values]:
        """The cosines alone: their nulls cost a hundred times as much, and a standard error asks for many states."""
        return _own_cosines(site, _from_state(site, part(state, "comoment")))

    def define(self, site: Site, whole: Presentations, controls: Controls) -> Rows:
        """S, E[x | fires] − E[x] and Σ of all presentations at once, unit by unit in float64."""
        everything = Whole(whole, self.positions)
        seen = _by_definition(site, everything)
        values = [_defined_cosines(site, seen, unit) for unit in range(site.units)]
        if site.fires and site.fan_in <= self.whitened_fan_in:
            sigmas = [_defined_sigma(everything.x_PGD[:, group]) for group in range(site.groups)]
            for one, cov, w, group in zip(values, seen.cov_UD, site.pattern_UD, site.group_U.tolist(), strict=True):
                one["template_cos_whitened"] = _defined_whitened(cov.numpy(), sigmas[group], w.numpy())
        neurons: dict[str, Values] = {"template_n": seen.n_U}
        neurons |= {name: torch.tensor([one[name] for one in values], dtype=torch.float64) for name in values[0]}
        patterns: dict[str, Values] = {
            "unit": torch.arange(site.units),
            "bias": site.bias_U,
            "weight": site.pattern_UD.float(),
            "cov": seen.cov_UD.float(),
            "mean_x": seen.mean_UD.float(),
        }
        if site.fires and seen.sta_UD is not None:
            patterns["sta"] = seen.sta_UD.float()
        if site.folded:
            patterns["raw_weight"] = site.raw_UD.float()
        if site.up_UD is not None:
            patterns["up_weight"] = site.up_UD.float()
        return {"neurons": neurons, "patterns": patterns}

    def _whitened(self, site: Site) -> bool:
        # without a gate a = w·x + b, S = Σw, and Σ⁻¹S = w whatever the data: no finding
        return site.fires and site.fan_in <= self.whitened_fan_in


class _Seen(NamedTuple):
    """Per unit n, S, E[x | fires] − E[x] (None without a gate) and E[x]; NaN where undefined, 0 where unresolved."""

    n_U: torch.Tensor
    cov_UD: torch.Tensor
    sta_UD: torch.Tensor | None
    mean_UD: torch.Tensor


def _from_state(site: Site, state: State) -> _Seen:
    n_U1 = state["n_U"].double()[:, None]
    repeats = site.units // len(state["x_m2_K"])
    x_variance_U1 = state["x_m2_K"].repeat_interleave(repeats)[:, None] / n_U1
    cov_UD = _resolved(state["cov_UD"] / n_U1, state["a_m2_U"][:, None] / n_U1 * x_variance_U1)
    mean_UD = torch.where(n_U1 > 0, state["x_mean_KD"].repeat_interleave(repeats, 0), torch.nan)
    sta_UD = None
    if site.fires:
        rate_U1 = state["n_fired_U"][:, None] / n_U1
        sta_UD = _resolved(state["fired_UD"] / n_U1, rate_U1 * (1 - rate_U1) * x_variance_U1) / rate_U1
    return _Seen(state["n_U"], cov_UD, sta_UD, mean_UD)


def _resolved(covariance_UD: torch.Tensor, variances_U1: torch.Tensor) -> torch.Tensor:
    """The covariance, 0 where it is below `RESOLUTION` of the root of the product of the variances."""
    vanishes_U1 = covariance_UD.square().sum(-1, keepdim=True) <= RESOLUTION**2 * variances_U1
    return torch.where(vanishes_U1, 0.0, covariance_UD)


def _own_cosines(site: Site, seen: _Seen) -> dict[str, Values]:
    cosines: dict[str, Values] = {"template_cos": cosine(seen.cov_UD, site.pattern_UD)}
    if seen.sta_UD is not None:
        cosines["template_cos_sta"] = cosine(seen.sta_UD, site.pattern_UD)
    return cosines


def _other_cosines(site: Site, cov_UD: torch.Tensor) -> dict[str, Values]:
    whole = site.whole or site
    if whole.units == site.groups:
        return {}
    null_3U = torch.empty((3, site.units), dtype=torch.float64)
    by_group = (value.view(site.groups, -1, site.fan_in) for value in (cov_UD, whole.pattern_UD))
    for units, cosines in cosine_blocks(*by_group, first=site.first):
        known_u = torch.from_numpy(cosines.shape[1] - np.isnan(cosines.numpy()).sum(-1))
        sizes = cosines.abs()
        null_3U[0, units] = sizes.nansum(-1) / known_u
        null_3U[1, units] = _quantile(sizes, known_u, 0.95).clamp(max=1)
        null_3U[2, units] = cosines.nansum(-1) / known_u
    names = ("template_cos_other_mean", "template_cos_other_p95", "template_cos_other_signed")
    return dict(zip(names, null_3U, strict=True))


def _quantile(rows_uV: torch.Tensor, known_u: torch.Tensor, level: float) -> torch.Tensor:
    """`nanquantile` of each row, `known_u` of whose values are no NaN: the same bits in a tenth of the time."""
    # NaN come last; NumPy sorts with the widest vectors of the processor, torch one number after the other
    ordered_uV = torch.from_numpy(np.sort(rows_uV.numpy(), axis=-1))
    rank_u = (level * (known_u - 1).double()).clamp(min=0)
    below_u, above_u = (ordered_uV.gather(1, place.long()[:, None])[:, 0] for place in (rank_u.floor(), rank_u.ceil()))
    return torch.lerp(below_u, above_u, rank_u - rank_u.floor())


def _permuted_cosines(site: Site, cov_UD: torch.Tensor) -> dict[str, Values]:
    """Mean and 95th percentile, for some units at a time; of a part each among the same units as of its site."""
    null_2U = torch.empty((2, site.units), dtype=torch.float64)
    step = max(1, PERMUTED_NUMBERS // (ABREAST * site.fan_in)) * ABREAST
    behind = 0 if site.whole is None else site.whole.units - site.first - site.units
    for start in range(-(site.first % ABREAST), site.units, step):
        units = slice(max(start, 0), min(start + step, site.units))
        front, end = units.start - start, units.stop - start
        # the last units of a site may be fewer
        padding = (0, 0, front, min(-end % ABREAST, site.units - units.stop + behind))
        both = (rows[units] for rows in (cov_UD, site.pattern_UD))
        among = _permuted(*(pad(rows, padding) if any(padding) else rows for rows in both))
        null_2U[:, units] = among[:, front:end]
    return {"template_cos_permuted_mean": null_2U[0], "template_cos_permuted_p95": null_2U[1]}


def _permuted(cov_UD: torch.Tensor, pattern_UD: torch.Tensor) -> torch.Tensor:
    # entries first: a permutation then moves whole rows
    cov_DU, pattern_DU = ((rows / rows.norm(dim=-1, keepdim=True)).T.contiguous() for rows in (cov_UD, pattern_UD))
    orders = permutations(len(cov_DU), PERMUTATIONS)
    null_KU = torch.stack([(cov_DU * pattern_DU[order]).sum(0).abs().clamp(max=1) for order in orders])
    return torch.stack([null_KU.mean(0), null_KU.quantile(0.95, dim=0).clamp(max=1)])


def _whitened(cov_UD: torch.Tensor, sigma_GDD: torch.Tensor) -> torch.Tensor:
    """(Σ + λI)⁻¹S of each unit by its group's Σ, up to a positive factor; NaN where the inputs do not vary."""
    groups, fan_in = sigma_GDD.shape[:2]
    scale_G = sigma_GDD.diagonal(dim1=1, dim2=2).mean(-1)
    ridge_DD = RIDGE * torch.eye(fan_in, dtype=torch.float64)
    factor_GDD = torch.linalg.cholesky_ex(sigma_GDD / scale_G[:, None, None] + ridge_DD).L
    return torch.cholesky_solve(cov_UD.view(groups, -1, fan_in).mT, factor_GDD).mT.flatten(0, 1)


def _patterns(site: Site, seen: _Seen) -> dict[str, Values]:
    vectors = {"weight": site.pattern_UD, "cov": seen.cov_UD, "sta": seen.sta_UD, "mean_x": seen.mean_UD}
    vectors["raw_weight"] = site.raw_UD if site.folded else None
    vectors["up_weight"] = site.up_UD
    columns: dict[str, Values] = {"unit": torch.arange(site.units), "bias": site.bias_U}
    return columns | {name: value.float() for name, value in vectors.items() if value is not None}


def _by_definition(site: Site, whole: Whole) -> _Seen:
    n, covs, stas, means = [], [], [], []
    for unit, group in enumerate(site.group_U.tolist()):
        keep = whole.valid_PU[:, unit] & np.isfinite(whole.x_PGD[:, group]).all(-1)
        x, z, a = (torch.from_numpy(v[keep]) for v in (whole.x_PGD[:, group], whole.z_PU[:, unit], whole.a_PU[:, unit]))
        x_rest, a_rest, fires = _rest(x), _rest(a), (z > 0).double()
        x_variance = x_rest.square().mean(0).sum()
        covs.append(_resolved((a_rest[:, None] * x_rest).mean(0), a_rest.square().mean() * x_variance))
        always = bool((z > 0).all())
        stas.append(_resolved(x_rest[z > 0].mean(0) * (not always), (1 / fires.mean() - 1) * x_variance))
        n.append(int(keep.sum()))
        means.append(x.mean(0))
    return _Seen(torch.tensor(n), torch.stack(covs), torch.stack(stas) if site.fires else None, torch.stack(means))


def _rest(value_PK: torch.Tensor) -> torch.Tensor:
    """Deviations from the mean; from the first value before, so that equal values leave exactly 0."""
    value_PK = value_PK - value_PK[:1]
    return value_PK - value_PK.mean(0)


def _defined_sigma(x_PD: Array) -> Array:
    """Cov(x) of the presentations whose x is finite."""
    rest_PD = _rest(torch.from_numpy(x_PD[np.isfinite(x_PD).all(-1)])).numpy()
    return np.asarray(rest_PD.T @ rest_PD / len(rest_PD)) if len(rest_PD) else np.full((x_PD.shape[1],) * 2, np.nan)


def _defined_whitened(cov_D: Array, sigma_DD: Array, w_D: Array) -> float:
    """cos((Σ + λI)⁻¹S, w) with λ a thousandth of the inputs' mean variance."""
    variance = sigma_DD.trace() / len(w_D)
    if not (variance > 0 and cov_D.any() and w_D.any()):
        return float("nan")
    whitened_D = np.linalg.solve(sigma_DD / variance + 0.001 * np.eye(len(w_D)), cov_D / np.abs(cov_D).max())
    return float(whitened_D @ w_D / np.linalg.norm(whitened_D) / np.linalg.norm(w_D))


@lru_cache(maxsize=16)
def _defined_orders(entries: int) -> list[list[int]]:
    """A hundred orders of a pattern's entries, each by the hashes of its number and theirs."""
    hashes = [[splitmix64(splitmix64(splitmix64(number)) ^ entry) for entry in range(entries)] for number in range(100)]
    return [sorted(range(entries), key=hashed.__getitem__) for hashed in hashes]


def _defined_cosines(site: Site, seen: _Seen, unit: int) -> dict[str, float]:
    def compare(left: torch.Tensor, right: torch.Tensor) -> float:
        return float(left @ right / (left @ left).sqrt() / (right @ right).sqrt())

    own, cov = site.pattern_UD[unit], seen.cov_UD[unit]
    group = site.group_U
    others = [v for v in range(site.units) if v != unit and group[v] == group[unit]]
    null = torch.tensor([compare(cov, site.pattern_UD[v]) for v in others], dtype=torch.float64)
    shuffled = [own[order] for order in _defined_orders(site.fan_in)]
    permuted = torch.tensor([abs(compare(cov, pattern)) for pattern in shuffled], dtype=torch.float64)
    values = {
        "template_cos": compare(cov, own),
        "template_cos_permuted_mean": float(permuted.mean()),
        "template_cos_permuted_p95": float(permuted.quantile(0.95)),
    }
    if others:
        values["template_cos_other_mean"] = float(null.abs().nanmean())
        values["template_cos_other_p95"] = float(null.abs().nanquantile(0.95))
        values["template_cos_other_signed"] = float(null.nanmean())
    if seen.sta_UD is not None:
        values["template_cos_sta"] = compare(seen.sta_UD[unit], own)
    return values


STATISTIC = Template()
