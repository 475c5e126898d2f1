"""How well a model does its task, from the outputs that a measurement sees anyway.

Layer 2: pure torch. Scores are sums, so they merge by adding; an output that is no classification has none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.nn import functional

from pipeline.batch import Batch

# score name → sum over rows; "labelled" counts the rows that the sums are over
Sums = dict[str, float]


def score(output: Any, batch: Batch) -> Sums:
    """Sums over the labelled rows of a batch: labelled, correct (greatest logit is the label), log_loss in nats."""
    label_N = batch.label_N
    if label_N is None or not isinstance(output, torch.Tensor) or output.ndim != 2 or len(output) != len(label_N):
        return {}
    known_N = (label_N >= 0) & (label_N < output.shape[1])
    logits_NC, label_N = output[known_N].double(), label_N[known_N]
    return {
        "labelled": float(len(label_N)),
        "correct": float((logits_NC.argmax(1) == label_N).sum()),
        "log_loss": float(functional.cross_entropy(logits_NC, label_N, reduction="sum")),
    }


def added(parts: Iterable[Mapping[str, float]]) -> Sums:
    """The sums of all parts, in the order given."""
    total: Sums = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total


def means(sums: Mapping[str, float]) -> dict[str, float]:
    """Accuracy and mean log-loss; nothing where no row has a label."""
    rows = sums.get("labelled", 0.0)
    return {"accuracy": sums["correct"] / rows, "log_loss": sums["log_loss"] / rows} if rows else {}
