"""Joins the calls of one site in a forward (a loop over time, over levels of a pyramid, over images) into one.

Layer 1: pure torch. Calls are kept as copies until the forward ends, because what they show may be overwritten; every
position of every call becomes an entry of its own, numbered on within its row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from pipeline.flow.layout import number_positions
from pipeline.input_forms import InputSums
from pipeline.sites import Presentations


class Collected:
    """The presentations of one site in one forward so far."""

    def __init__(self) -> None:
        self._calls: list[Presentations] = []

    def add(self, call: Presentations) -> None:
        """Keep the next call."""
        x = call.patches(0, call.entries).clone()
        sums = call.input_sums()
        self._calls.append(
            replace(
                call,
                z_LSU=call.z_LSU.clone(),
                a_LSU=call.a_LSU.clone(),
                affine_LSU=None if call.affine_LSU is None else call.affine_LSU.clone(),
                patches=lambda start, stop: x[start:stop],
                patches_at=None,
                windows=None,
                input_sums=lambda: sums,
            )
        )

    def joined(self) -> Presentations:
        """All calls as one: an entry per presentation, each of one position."""
        calls = self._calls
        row_L = torch.cat([_of_each(call, call.row_index_L[:, None]) for call in calls])
        first = calls[0]
        return replace(
            first,
            z_LSU=_flat(calls, lambda call: call.z_LSU),
            a_LSU=_flat(calls, lambda call: call.a_LSU),
            affine_LSU=None if first.affine_LSU is None else _flat(calls, lambda call: _affine(call)),
            row_L=row_L,
            position_LS=number_positions(row_L, 1, first.rows),
            mask_LS=_masks(calls),
            label_LS=_labels(calls),
            padded_S=None,
            patches=lambda start, stop: _patches(calls, start, stop),
            input_sums=lambda: _sums(calls),
        )


def _affine(call: Presentations) -> torch.Tensor:
    assert call.affine_LSU is not None
    return call.affine_LSU


def _of_each(call: Presentations, value_LS: torch.Tensor) -> torch.Tensor:
    return value_LS.expand(call.entries, call.positions).reshape(-1)


def _flat(calls: Sequence[Presentations], part: Callable[[Presentations], torch.Tensor]) -> torch.Tensor:
    return torch.cat([part(call).reshape(-1, 1, part(call).shape[-1]) for call in calls])


def _masks(calls: Sequence[Presentations]) -> torch.Tensor | None:
    if all(call.mask_LS is None for call in calls):
        return None
    ones = torch.ones((1, 1), dtype=torch.bool, device=calls[0].z_LSU.device)
    return torch.cat([_of_each(call, ones if call.mask_LS is None else call.mask_LS) for call in calls])[:, None]


def _labels(calls: Sequence[Presentations]) -> torch.Tensor | None:
    """The class of each presentation; None unless all calls are of the positions that have labels."""
    labels = [_of_each(call, call.label_LS) for call in calls if call.label_LS is not None]
    return torch.cat(labels)[:, None] if len(labels) == len(calls) else None


def _patches(calls: Sequence[Presentations], start: int, stop: int) -> torch.Tensor:
    parts, before = [], 0
    for call in calls:
        low, high = max(start - before, 0), min(stop - before, call.entries * call.positions)
        before += call.entries * call.positions
        if low < high:
            first, last = low // call.positions, -(-high // call.positions)
            x = call.patches(first, last).flatten(0, 1)[:, None]
            parts.append(x[low - first * call.positions : high - first * call.positions])
    return torch.cat(parts) if parts else calls[0].patches(0, 0).flatten(0, 1)[:, None]


def _sums(calls: Sequence[Presentations]) -> InputSums:
    sums = [call.input_sums() for call in calls]
    parts = [
        torch.cat([part.reshape(-1, 1, part.shape[-1]) for part in each])
        for each in zip(*[(one.sum_LSG, one.square_LSG, one.centred_LSG) for one in sums], strict=True)
    ]
    return InputSums(*parts)
