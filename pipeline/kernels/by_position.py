"""Each position of a row as a row of its own: how positions that have labels are counted.

Layer 1: pure torch, no I/O. So every kernel sums by the classes of positions as it does by those of rows.

Shapes: L entries, S positions, U units.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from pipeline.hashing import row_hash
from pipeline.input_forms import InputSums
from pipeline.sites import Presentations

POSITION_SEED = 0x9051710


def by_position(presentations: Presentations) -> Presentations:
    """L·S rows of one position, in order; `label_LS` becomes their label_N, the hash of (uid, position) their uid."""
    shown, positions = presentations, presentations.positions

    def apart(value_LSK: torch.Tensor) -> torch.Tensor:
        return value_LSK.flatten(0, 1).unsqueeze(1)

    def patches(start: int, stop: int) -> torch.Tensor:
        first = start // positions
        x = apart(shown.patches(first, -(-stop // positions)))
        return x[start - first * positions : stop - first * positions]

    def input_sums() -> InputSums:
        sums = shown.input_sums()
        return InputSums(apart(sums.sum_LSG), apart(sums.square_LSG), apart(sums.centred_LSG))

    z_LSU = apart(shown.z_LSU)
    return replace(
        shown,
        z_LSU=z_LSU,
        a_LSU=z_LSU if shown.a_LSU is shown.z_LSU else apart(shown.a_LSU),
        affine_LSU=None if shown.affine_LSU is None else apart(shown.affine_LSU),
        gradient_LSU=None if shown.gradient_LSU is None else apart(shown.gradient_LSU),
        uid_N=_uids(shown),
        label_N=None if shown.label_LS is None else shown.label_LS.flatten(),
        label_LS=None,
        mask_LS=None if shown.mask_LS is None else apart(shown.mask_LS),
        row_L=None,
        position_LS=None,
        padded_S=None,
        patches=patches,
        patches_at=None,
        windows=None,
        input_sums=input_sums,
        # by uid, and these are new ones at every site
        memo={},
    )


def _uids(shown: Presentations) -> torch.Tensor:
    number_LS = shown.position_LS
    if number_LS is None:
        number_LS = torch.arange(shown.positions, device=shown.uid_N.device).expand(shown.entries, -1)
    return row_hash(shown.uid_N[shown.row_index_L, None], seed=POSITION_SEED, unit=number_LS).flatten()
