"""The reference kernel: every primitive that a site's statistics need, from one batch, in plain torch.

Layer 1: pure torch, no I/O. It is the definition that a fused kernel must equal: counts, extremes and choices exactly,
float64 sums to rounding. Rows are taken in blocks, so that temporaries stay small however large the batch is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from pipeline.input_forms import InputSums
from pipeline.kernels import bulk
from pipeline.kernels.base import Primitive, State
from pipeline.kernels.view import View
from pipeline.sites import Presentations

# z values in a block: 2 MiB of float64, so that temporaries are reused and not returned to the system
BLOCK_VALUES = 1 << 18


def observe_all(primitives: Sequence[Primitive], presentations: Presentations) -> list[State]:
    """The state of one batch for each primitive, on the device of the batch; intermediate results are shared."""
    if not primitives:
        return []
    states: list[State] = []
    for block in _blocks(presentations):
        view = View.of(block)
        seen = [primitive.observe(view) for primitive in primitives]
        if states:
            seen = [one.merge(*pair) for one, *pair in zip(primitives, states, seen, strict=True)]
        states = seen
    return states


def _blocks(presentations: Presentations) -> Iterator[Presentations]:
    """Runs of rows with about `BLOCK_VALUES` values of z, `bulk.VALUES` on a GPU, whole rows always."""
    rows, z_LSU = presentations.rows, presentations.z_LSU
    pieces = -(-z_LSU.numel() // (bulk.VALUES if bulk.in_bulk(z_LSU) else BLOCK_VALUES))
    step = max(1, -(-rows // max(1, pieces)))
    if step >= rows:
        yield presentations
        return
    for start in range(0, rows, step):
        yield _rows_between(presentations, start, min(start + step, rows))


def _rows_between(presentations: Presentations, start: int, stop: int) -> Presentations:
    if presentations.row_L is not None:
        row_N = torch.arange(presentations.rows, device=presentations.uid_N.device)
        return presentations.select_rows((row_N >= start) & (row_N < stop))

    def input_sums() -> InputSums:
        sums = presentations.input_sums()
        return InputSums(sums.sum_LSG[start:stop], sums.square_LSG[start:stop], sums.centred_LSG[start:stop])

    def cut(value: torch.Tensor | None) -> torch.Tensor | None:
        return None if value is None else value[start:stop]

    def patches_at(first: int, last: int, index_lK: torch.Tensor) -> torch.Tensor:
        assert presentations.patches_at is not None
        return presentations.patches_at(start + first, min(start + last, stop), index_lK)

    z_LSU = presentations.z_LSU[start:stop]
    return replace(
        presentations,
        z_LSU=z_LSU,
        a_LSU=z_LSU if presentations.a_LSU is presentations.z_LSU else presentations.a_LSU[start:stop],
        affine_LSU=cut(presentations.affine_LSU),
        uid_N=presentations.uid_N[start:stop],
        label_N=cut(presentations.label_N),
        mask_LS=cut(presentations.mask_LS),
        position_LS=cut(presentations.position_LS),
        label_LS=cut(presentations.label_LS),
        gradient_LSU=cut(presentations.gradient_LSU),
        patches=lambda first, last: presentations.patches(start + first, min(start + last, stop)),
        patches_at=None if presentations.patches_at is None else patches_at,
        windows=None,
        input_sums=input_sums,
    )
