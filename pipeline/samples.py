"""Which rows a sample takes: drawn by the hash of their uid, the same however they come.

Layer 2. Of two samples the smaller one's rows are among the greater one's.
"""

from __future__ import annotations

import torch

from pipeline.hashing import row_hash
from pipeline.sites import Presentations

SAMPLE_SEED = 0x5EED


def sampled(presentations: Presentations, shift: int) -> Presentations:
    """The presentations of the rows of a sample of one in 2**shift; themselves where those are all."""
    if shift == 0:
        return presentations
    keep_N, is_all = presentations.remembered(("sample", shift), lambda: _sample(presentations.uid_N, shift))
    return presentations if is_all else presentations.select_rows(keep_N)


def _sample(uid_N: torch.Tensor, shift: int) -> tuple[torch.Tensor, bool]:
    keep_N = in_sample(uid_N, shift)
    return keep_N, bool(keep_N.all())


def in_fraction(uid_N: torch.Tensor, fraction: float) -> torch.Tensor:
    """Which of the rows are among a fraction of all, bool."""
    # the same hash as the samples of statistics: of two fractions the smaller one's rows are among the greater one's
    return row_hash(uid_N, seed=SAMPLE_SEED) < int(fraction * 2**63)


def in_sample(uid_N: torch.Tensor, shift: int) -> torch.Tensor:
    """Which of the rows are in the sample of one in 2**shift, bool."""
    return row_hash(uid_N, seed=SAMPLE_SEED) >> (63 - shift) == 0
