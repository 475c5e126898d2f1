"""A fixed sample of the positions of each entry: neighbouring positions of a large map say much the same.

Layer 1: pure torch, no I/O. The sample is a function of row uid and position number alone, so it is the same in every
batch, split and order.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from pipeline.hashing import row_hash
from pipeline.input_forms import InputSums
from pipeline.kernels import bulk
from pipeline.sites import Presentations

SEED = 0x70051710
# numbers of x in one call for patches, 16 MiB of float32
SLICE_NUMBERS = 1 << 22
_LAST = (1 << 63) - 1


def thinned(presentations: Presentations, positions: int) -> Presentations:
    """At most `positions` positions of each entry, those of smallest hash (row uid, position number), in order.

    Masked positions are taken only where too few others are left; they stay masked.
    """
    if presentations.positions <= positions:
        return presentations
    index_LK = _chosen(presentations, positions)

    def picked(value_LS: torch.Tensor | None) -> torch.Tensor | None:
        return None if value_LS is None else value_LS.take_along_dim(index_LK, 1)

    def units(value_LSU: torch.Tensor) -> torch.Tensor:
        return value_LSU.take_along_dim(index_LK[..., None], 1)

    def input_sums() -> InputSums:
        sums = presentations.input_sums()
        return InputSums(units(sums.sum_LSG), units(sums.square_LSG), units(sums.centred_LSG))

    a_is_z = presentations.a_LSU is presentations.z_LSU
    z_LSU = units(presentations.z_LSU)
    affine_LSU, gradient_LSU = presentations.affine_LSU, presentations.gradient_LSU
    return replace(
        presentations,
        z_LSU=z_LSU,
        a_LSU=z_LSU if a_is_z else units(presentations.a_LSU),
        affine_LSU=None if affine_LSU is None else units(affine_LSU),
        gradient_LSU=None if gradient_LSU is None else units(gradient_LSU),
        mask_LS=picked(presentations.mask_LS),
        position_LS=picked(_numbers(presentations)),
        padded_S=None,
        patches=lambda start, stop: _patches(presentations, index_LK, start, stop),
        patches_at=None,
        windows=None,
        input_sums=input_sums,
    )


def _numbers(presentations: Presentations) -> torch.Tensor:
    if presentations.position_LS is not None:
        return presentations.position_LS
    number_S = torch.arange(presentations.positions, device=presentations.z_LSU.device)
    return number_S.expand(presentations.entries, -1)


def _chosen(presentations: Presentations, positions: int) -> torch.Tensor:
    uid_L1 = presentations.uid_N[presentations.row_index_L][:, None]
    hash_LS = row_hash(uid_L1, seed=SEED, unit=_numbers(presentations))
    if presentations.mask_LS is not None:
        hash_LS = hash_LS.masked_fill(~presentations.mask_LS, _LAST)
    return hash_LS.topk(positions, dim=1, largest=False, sorted=False).indices.sort(dim=1).values


def _patches(presentations: Presentations, index_LK: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    site = presentations.site
    numbers = bulk.NUMBERS if bulk.in_bulk(presentations.z_LSU) else SLICE_NUMBERS
    step = max(1, numbers // max(1, presentations.positions * site.groups * site.fan_in))
    runs = [(first, min(first + step, stop)) for first in range(start, stop, step)] or [(start, start)]
    return torch.cat([_patches_at(presentations, first, last, index_LK[first:last]) for first, last in runs])


def _patches_at(presentations: Presentations, first: int, last: int, index_lK: torch.Tensor) -> torch.Tensor:
    if presentations.patches_at is not None:
        return presentations.patches_at(first, last, index_lK)
    return presentations.patches(first, last).take_along_dim(index_lK[:, :, None, None], 1)
