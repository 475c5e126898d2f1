"""How well an input matches a pattern: the cosine of x and w, and their correlation over the D inputs.

Layer 1: pure torch, no I/O. Both follow from w·x + b and sums over x that all units of a group share, in float64. The
order of the operations below is part of the definition: a kernel that keeps it fills the same bins.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from pipeline.input_forms import InputSums
from pipeline.sites import Presentations, Site

Form = Literal["pearson", "cosine"]

# Σ(x − x̄)² at or below this part of Σx² is the rounding of a constant vector: its correlation is undefined
CONSTANT = 2.0**-40


class Match(NamedTuple):
    """The match, in [−1, 1] and 0 where undefined, and where it is defined; None if everywhere."""

    value: torch.Tensor
    defined: torch.Tensor | None


def match(site: Site, form: Form, affine: torch.Tensor, sums: InputSums) -> Match:
    """Match of each presentation and unit, from finite `affine` = w·x + b (…, U) and the sums of x, (…, U) or (…, 1).

    Undefined where x or w is 0, and for the correlation where either is constant or D < 3.
    """
    norm_U, mean_U, centred_norm_U, bias_U, _ = site.numbers_on(affine.device)
    square, spread = sums.square_LSG, sums.centred_LSG
    # adding the negative never gives −0, so that a value's sign bit says on which side of 0 it is
    value = affine + (0.0 - bias_U)
    if form == "cosine":
        length, length_U = square.sqrt(), norm_U
        defined, defined_U = square > 0, norm_U > 0
    else:
        # in the memory order of z: a product in another order makes every later pass slow
        value -= torch.mul(sums.sum_LSG, mean_U, out=torch.empty_like(value))
        length, length_U = spread.sqrt(), centred_norm_U
        defined = spread > CONSTANT * square
        defined_U = (centred_norm_U.square() > CONSTANT * norm_U.square()) & (site.fan_in >= 3)
    defined = defined & square.isfinite()
    value.mul_(length_U.reciprocal()).mul_(length.reciprocal()).clamp_(-1, 1)
    if bool(defined.all()) and bool(defined_U.all()):
        return Match(value, None)
    defined = (defined & defined_U).expand(value.shape)
    return Match(value.masked_fill_(~defined, 0), defined)


def by_unit(site: Site, sums: InputSums) -> InputSums:
    """The sums of each unit's own group: (…, G) as (…, U), or as they are where one group serves all units."""
    if site.groups == 1:
        return sums
    group_U = site.numbers_on(sums.sum_LSG.device).group_U
    return InputSums(sums.sum_LSG[..., group_U], sums.square_LSG[..., group_U], sums.centred_LSG[..., group_U])


def patterns_of(site: Site) -> list[torch.Tensor]:
    """−b, w̄, 1/‖w − w̄‖ and 1/‖w‖ of every unit, NaN where a match is undefined."""
    norm_U, mean_U, centred_norm_U = site.scales
    varied_U = (centred_norm_U.square() > CONSTANT * norm_U.square()) & (site.fan_in >= 3)
    return [
        0.0 - site.bias_U.double(),
        mean_U.contiguous(),
        centred_norm_U.reciprocal().masked_fill_(~varied_U, torch.nan),
        norm_U.reciprocal().masked_fill_(norm_U <= 0, torch.nan),
    ]


def lengths_of(presentations: Presentations) -> tuple[torch.Tensor, ...]:
    """Σx, 1/‖x − x̄‖ and 1/‖x‖ of every presentation, NaN where a match is undefined; computed once for the same x."""
    sums = presentations.input_sums()
    if sums.lengths is None:
        square, spread = sums.square_LSG, sums.centred_LSG
        finite = square.isfinite()
        sums.lengths = (
            sums.sum_LSG,
            spread.sqrt().reciprocal_().masked_fill_(~(finite & (spread > CONSTANT * square)), torch.nan),
            square.sqrt().reciprocal_().masked_fill_(~(finite & (square > 0)), torch.nan),
        )
    return sums.lengths
