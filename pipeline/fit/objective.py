"""What a model is trained to do, and how well it does it.

Layer 2: pure torch. G models that learn at once, N rows, T positions, C classes or tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import exp
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from pipeline.batch import Batch
from pipeline.models.base import Family

Objective = Literal["classes", "next token"]

# not a class and not a token: rows without a label, padding
NOTHING = -1


def targets(family: Family, batch: Batch) -> torch.Tensor:
    """The class of each row, or of each position the token behind it: int64, NOTHING where there is none.

    Any leading axes of the batch are kept; the last position of a sequence has no target and is left out.
    """
    if family.objective == "classes":
        assert batch.label_N is not None
        return batch.label_N
    return next_tokens(batch)


def next_tokens(batch: Batch) -> torch.Tensor:
    """Of each position but the last the token behind it, NOTHING where either is padding."""
    token = batch.inputs[0]
    mask = batch.kwargs.get("mask", batch.mask_NS)
    return token[..., 1:] if mask is None else token[..., 1:].where(mask[..., 1:] & mask[..., :-1], NOTHING)


def predictions(family: Family, logits: torch.Tensor) -> torch.Tensor:
    """The logits that `targets` are the targets of."""
    return logits if family.objective == "classes" else logits[..., :-1, :]


def losses(logits: torch.Tensor, target: torch.Tensor, smoothing: float) -> torch.Tensor:
    """The mean cross-entropy of each of the G models, in nats: logits (G, …, C), target (G, …)."""
    if logits.ndim == 3 and logits.mT.is_contiguous():
        # a row's logits lie apart: over them all rows go at once, four times as fast as one by one
        each = functional.cross_entropy(
            logits.mT, target, ignore_index=NOTHING, label_smoothing=smoothing, reduction="none"
        )
    else:
        each = functional.cross_entropy(
            logits.flatten(0, -2), target.flatten(), ignore_index=NOTHING, label_smoothing=smoothing, reduction="none"
        )
    # elementwise and along rows of one model: no model's sum depends on how many there are
    total_G = each.view(len(target), -1).sum(1)
    return total_G / (target != NOTHING).flatten(1).sum(1).clamp(min=1)


@torch.no_grad()
def scores(family: Family, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
    """Of a model in eval mode: loss in nats, accuracy; of two classes also AUC, of tokens also perplexity."""
    known, loss, correct = 0, 0.0, 0
    odds: list[tuple[torch.Tensor, torch.Tensor]] = []
    for batch in batches:
        target = targets(family, batch)
        has_target = target != NOTHING
        logits_MC = predictions(family, batch.forward(model))[has_target].double()
        target_M = target[has_target]
        known += len(target_M)
        loss += functional.cross_entropy(logits_MC, target_M, reduction="sum").item()
        correct += int((logits_MC.argmax(1) == target_M).sum())
        if logits_MC.shape[1] == 2:
            odds.append((logits_MC[:, 1] - logits_MC[:, 0], target_M == 1))
    found = {"loss": loss / known, "accuracy": correct / known}
    if family.objective == "next token":
        found["perplexity"] = exp(min(found["loss"], 700.0))
    elif odds:
        score_M, positive_M = (torch.cat(parts) for parts in zip(*odds, strict=True))
        if 0 < int(positive_M.sum()) < len(positive_M):
            found["auc"] = area_under_curve(score_M, positive_M)
    return found


def area_under_curve(score_N: torch.Tensor, positive_N: torch.Tensor) -> float:
    """The chance that a positive row has a higher score than another, ties counting half (Mann & Whitney 1947)."""
    positives = int(positive_N.sum())
    negatives = len(positive_N) - positives
    _, inverse_N, count = score_N.unique(return_inverse=True, return_counts=True)
    rank = count.cumsum(0).double() - (count - 1).double() / 2
    wins = rank[inverse_N][positive_N].sum().item() - positives * (positives + 1) / 2
    return wins / (positives * negatives)
