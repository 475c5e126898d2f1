"""Sites and presentations made from explicit arrays: what the laws are tested on, and a factory for any other test.

Shapes: N rows, L entries, S positions, G groups, D fan-in, U units.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch.nn import functional

from pipeline.input_forms import InputSums
from pipeline.sites import InputSpace, Presentations, Site

GATES = {
    "identity": lambda z: z,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def make_site(pattern_UD, bias_U=None, *, gate="relu", groups=1, name="site", **fields) -> Site:
    """A dense-like site with these patterns; `fields` override any field of `Site`."""
    pattern_UD = torch.as_tensor(pattern_UD, dtype=torch.float64)
    units, fan_in = pattern_UD.shape
    bias_U = torch.zeros(units, dtype=torch.float64) if bias_U is None else torch.as_tensor(bias_U).double()
    made = Site(
        name=name,
        path=name,
        call=0,
        index=0,
        kind="dense",
        gate=gate,
        pattern_UD=pattern_UD,
        bias_U=bias_U,
        raw_UD=pattern_UD.clone(),
        inputs=InputSpace("features", (fan_in,)),
        groups=groups,
    )
    return replace(made, **fields)


def input_sums(x_LSGD: torch.Tensor) -> InputSums:
    """The sums that match needs, each presentation by itself."""
    x_LSGD = x_LSGD.double()
    mean_LSG1 = x_LSGD.mean(-1, keepdim=True)
    return InputSums(x_LSGD.sum(-1), x_LSGD.square().sum(-1), (x_LSGD - mean_LSG1).square().sum(-1))


def make_presentations(site: Site, x_LSGD, *, uid_N=None, dtype=torch.float32, z_LSU=None, a_LSU=None, **fields):
    """Presentations of the inputs x (L, S, G, D), or (N, D) for one position and group.

    z is w·x + b, computed in float64 and rounded to `dtype`, and a its gate's output, unless given. Rows are numbered
    from 0 unless `uid_N` names them; `fields` sets any other field of `Presentations`.
    """
    x_LSGD = torch.as_tensor(x_LSGD, dtype=torch.float64)
    if x_LSGD.ndim == 2:
        x_LSGD = x_LSGD[:, None, None, :]
    x_LSGD = x_LSGD.to(dtype)
    pattern_GuD = site.pattern_UD.unflatten(0, (site.groups, -1))
    if z_LSU is None:
        z_LSU = torch.einsum("lsgd,gud->lsgu", x_LSGD.double(), pattern_GuD).flatten(2) + site.bias_U
    z_LSU = torch.as_tensor(z_LSU).to(dtype)
    if a_LSU is None:
        a_LSU = z_LSU if site.gate == "identity" else GATES[site.gate](z_LSU)
    if uid_N is None:
        rows = len(x_LSGD) if fields.get("row_L") is None else int(fields["row_L"].max()) + 1
        uid_N = torch.arange(rows)

    @cache
    def sums() -> InputSums:
        return input_sums(x_LSGD)

    return Presentations(
        site=site,
        z_LSU=z_LSU,
        a_LSU=torch.as_tensor(a_LSU).to(dtype) if a_LSU is not z_LSU else z_LSU,
        uid_N=torch.as_tensor(uid_N),
        patches=lambda start, stop: x_LSGD[start:stop],
        input_sums=sums,
        **fields,
    )


def split(shown: Presentations, piece_N) -> list[Presentations]:
    """The rows whose piece is 0, those whose piece is 1, …: any split of the data, empty pieces included."""
    piece_N = torch.as_tensor(piece_N)
    return [shown.select_rows(piece_N == piece) for piece in range(max(piece_N.tolist(), default=-1) + 1)]


def reordered(shown: Presentations, order_N) -> Presentations:
    """The same rows in another order (their entries with them)."""
    order_N = torch.as_tensor(order_N)
    new_N = torch.empty_like(order_N)
    new_N[order_N] = torch.arange(len(order_N))
    row_L = new_N[shown.row_index_L]
    entry_L = torch.argsort(row_L, stable=True)
    x_LSGD = shown.patches(0, shown.entries)[entry_L]
    sums = shown.input_sums()
    sums = InputSums(sums.sum_LSG[entry_L], sums.square_LSG[entry_L], sums.centred_LSG[entry_L])

    def picked(value):
        return None if value is None else value[entry_L]

    z_LSU = shown.z_LSU[entry_L]
    return replace(
        shown,
        z_LSU=z_LSU,
        a_LSU=z_LSU if shown.a_LSU is shown.z_LSU else shown.a_LSU[entry_L],
        affine_LSU=picked(shown.affine_LSU),
        uid_N=shown.uid_N[order_N],
        label_N=None if shown.label_N is None else shown.label_N[order_N],
        row_L=None if shown.row_L is None else row_L[entry_L],
        mask_LS=picked(shown.mask_LS),
        position_LS=picked(shown.position_LS),
        label_LS=picked(shown.label_LS),
        gradient_LSU=picked(shown.gradient_LSU),
        patches=lambda start, stop: x_LSGD[start:stop],
        input_sums=lambda: sums,
    )


def permuted_site(site: Site, order_U: torch.Tensor) -> Site:
    """The site with its units in another order (within their groups)."""
    up_UD = None if site.up_UD is None else site.up_UD[order_U]
    return replace(
        site, pattern_UD=site.pattern_UD[order_U], bias_U=site.bias_U[order_U], raw_UD=site.raw_UD[order_U], up_UD=up_UD
    )


def permuted(shown: Presentations, order_U: torch.Tensor) -> Presentations:
    """The presentations to the site with its units in another order (within their groups)."""
    z_LSU = shown.z_LSU[..., order_U]
    return replace(
        shown,
        site=permuted_site(shown.site, order_U),
        z_LSU=z_LSU,
        a_LSU=z_LSU if shown.a_LSU is shown.z_LSU else shown.a_LSU[..., order_U],
        affine_LSU=None if shown.affine_LSU is None else shown.affine_LSU[..., order_U],
        gradient_LSU=None if shown.gradient_LSU is None else shown.gradient_LSU[..., order_U],
    )


@dataclass(frozen=True)
class Recipe:
    """What kind of batch to draw; `seed` draws the numbers, so that no value lies on a bin's edge by construction."""

    seed: int
    rows: int = 8
    positions: int = 1
    units: int = 3
    fan_in: int = 5
    groups: int = 1
    gate: str = "relu"
    dtype: torch.dtype = torch.float32
    scale: float = 1.0
    shift: float = 0.0
    spread: bool = False
    masked: bool = False
    numbered: bool = False
    labelled: bool = True
    by_position: bool = False
    normed: bool = False
    repeated: bool = False
    constant: bool = False
    paired: bool = False
    graded: bool = False
    tied: bool = False
    flat: bool = False
    unbiased: bool = False
    overflown: bool = False
    bad: tuple[float, ...] = ()


def draw(recipe: Recipe) -> Presentations:
    """Presentations by a recipe: the same for the same recipe."""
    random = np.random.default_rng(recipe.seed)
    units = recipe.units * recipe.groups
    pattern_UD = random.normal(size=(units, recipe.fan_in))
    bias_U = np.zeros(units) if recipe.unbiased else random.normal(size=units) + recipe.shift
    site = make_site(pattern_UD, bias_U, gate=recipe.gate, groups=recipe.groups)
    if recipe.paired:
        up_UD = torch.as_tensor(random.normal(size=pattern_UD.shape))
        wired = tuple((0, (7 * channel) % 8 // 2) for channel in range(recipe.fan_in * recipe.groups))
        inputs = replace(site.inputs, upstream=("before",), upstream_unit=wired)
        # a LayerNorm's gain turns patterns, a BatchNorm's may flip them
        raw_UD = site.pattern_UD * torch.arange(1.0, recipe.fan_in + 1) * (-1) ** torch.arange(units)[:, None]
        site = replace(site, up_UD=up_UD, raw_UD=raw_UD, folded=("norm",), inputs=inputs)
    fields = {}
    entries = recipe.rows
    if recipe.spread and recipe.rows:
        # every row has 0 to 3 entries, in any order, so a row may have none
        row_L = torch.as_tensor(
            random.permutation(np.repeat(np.arange(recipe.rows), random.integers(0, 4, recipe.rows)))
        )
        entries, fields["row_L"] = len(row_L), row_L
    shape = (entries, recipe.positions)
    x_LSGD = _inputs(recipe, random, (*shape, recipe.groups, recipe.fan_in))
    if recipe.masked:
        fields["mask_LS"] = torch.as_tensor(random.random(shape) < 0.6)
    if recipe.numbered or recipe.spread:
        fields["position_LS"] = torch.as_tensor(random.permuted(np.arange(entries * recipe.positions)).reshape(shape))
    if recipe.labelled:
        name, of = ("label_LS", shape) if recipe.by_position else ("label_N", recipe.rows)
        # neither the first, unknown, nor the last is one of the classes
        fields[name] = torch.tensor([-1, 0, 1, 2, 255])[random.integers(0, 5, of)]
        fields["classes"] = 3
    uid_N = torch.as_tensor(random.choice(10**12, recipe.rows, replace=False))
    shown = make_presentations(site, x_LSGD, uid_N=uid_N, dtype=recipe.dtype, **fields)
    return _spoilt(recipe, random, shown)


def _inputs(recipe: Recipe, random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    x_LSGD = random.normal(size=shape) * recipe.scale
    if recipe.constant:
        x_LSGD[:] = random.normal(size=shape[-1]) * recipe.scale
    if recipe.repeated and len(x_LSGD):
        x_LSGD = x_LSGD[random.integers(0, max(1, len(x_LSGD) // 3), len(x_LSGD))]
    if recipe.tied:
        x_LSGD[random.random(shape[:2]) < 0.3] = 0
    if recipe.flat:
        # all entries of a vector equal: in binary no mean of them need be exact
        where = random.random(shape[:2]) < 0.3
        x_LSGD[where] = recipe.scale * random.choice([0.1, 0.7, 3.1], (int(where.sum()), 1, 1))
    return x_LSGD


def _spoilt(recipe: Recipe, random: np.random.Generator, shown: Presentations) -> Presentations:
    """What no affine map gave: a norm between map and gate, NaN or infinities at single units, gradients."""
    if recipe.normed:
        shown = replace(shown, affine_LSU=shown.z_LSU, z_LSU=(shown.z_LSU - shown.z_LSU.mean(-1, keepdim=True)))
        if recipe.bad:
            affine_LSU = shown.z_LSU.clone() if shown.affine_LSU is None else shown.affine_LSU.clone()
            affine_LSU[torch.as_tensor(random.random(affine_LSU.shape) < 0.1)] = torch.nan
            shown = replace(shown, affine_LSU=affine_LSU)
    if recipe.bad:
        z_LSU = shown.z_LSU.clone()
        where = torch.as_tensor(random.random(z_LSU.shape) < 0.15)
        z_LSU[where] = torch.as_tensor(random.choice(recipe.bad, int(where.sum()))).to(z_LSU.dtype)
        shown = replace(shown, z_LSU=z_LSU)
    a_LSU = shown.z_LSU if recipe.gate == "identity" else GATES[recipe.gate](shown.z_LSU)
    if recipe.overflown:
        # an exponential gate makes infinities of finite z
        a_LSU = a_LSU.masked_fill(torch.as_tensor(random.random(a_LSU.shape) < 0.1), torch.inf)
    gradient_LSU = torch.as_tensor(random.normal(size=a_LSU.shape)).to(a_LSU.dtype) if recipe.graded else None
    if gradient_LSU is not None and recipe.bad:
        gradient_LSU[torch.as_tensor(random.random(a_LSU.shape) < 0.1)] = torch.nan
    return replace(shown, a_LSU=a_LSU, gradient_LSU=gradient_LSU)
