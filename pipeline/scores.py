"""How well a model does its task, from the outputs that a measurement sees anyway.

Layer 2: pure torch. Scores are sums, so they merge by adding; an output that is no classification has none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import groupby
from math import exp
from typing import Any

import torch
from torch.nn import functional

from pipeline.batch import Batch
from pipeline.fit.objective import NOTHING, Objective, next_tokens
from pipeline.kernels import bulk

# score name → sum over rows (or tokens); "labelled" counts what the sums are over
Sums = dict[str, float]

# sums of two classes: rows of each class, "odds 0" and "odds 1", by their log-odds in a float of 8 bits of precision
_ODDS = ("odds 0 ", "odds 1 ")
# logits that are widened at a time, 8 MiB of float64
_NUMBERS = 1 << 20


def score(output: Any, batch: Batch, objective: Objective = "classes", *, classes: int | None = None) -> Sums:
    """Sums over the labelled rows of a batch: labelled, correct (greatest logit is the label), log_loss in nats.

    Nothing of an output that is not one logit per class: of `classes`, where their number is known, else of several.
    Of two classes also how often each log-odds occurs; of a language model over tokens, "tokens" of them.
    """
    if not isinstance(output, torch.Tensor):
        return {}
    if objective == "next token":
        target, logits = next_tokens(batch), output[:, :-1]
    elif batch.label_N is not None and output.ndim == 2 and len(output) == len(batch.label_N):
        if output.shape[1] != (classes or max(2, output.shape[1])):
            return {}
        target, logits = batch.label_N, output
    else:
        return {}
    known = (target != NOTHING) & (target >= 0) & (target < logits.shape[-1])
    target_M, place_M = target[known], known.nonzero()
    # the logits of a large vocabulary in float64 would take more memory than the model
    step = max(1, (bulk.NUMBERS if bulk.in_bulk(logits) else _NUMBERS) // max(1, logits.shape[-1]))
    right_M, loss_M = torch.empty_like(target_M, dtype=torch.bool), torch.empty_like(target_M, dtype=torch.float64)
    for some in (slice(start, start + step) for start in range(0, len(target_M), step)):
        logits_mC = logits[place_M[some].unbind(1)]
        right_M[some] = logits_mC.argmax(1) == target_M[some]
        loss_M[some] = functional.cross_entropy(logits_mC.double(), target_M[some], reduction="none")
    sums = {"labelled": float(len(target_M)), "correct": float(right_M.sum()), "log_loss": float(loss_M.sum())}
    if objective == "next token":
        return {**sums, "tokens": sums["labelled"]}
    return {**sums, **_odds(logits[known], target_M)} if logits.shape[-1] == 2 else sums


def _odds(logits_M2: torch.Tensor, label_M: torch.Tensor) -> Sums:
    # one row in 256 apart is a tie: it changes no area by as much as the sample does
    rounded_M = (logits_M2[:, 1].double() - logits_M2[:, 0].double()).to(torch.bfloat16).tolist()
    counts = Counter(zip(label_M.tolist(), rounded_M, strict=True))
    return {f"{_ODDS[label]}{value}": float(count) for (label, value), count in sorted(counts.items())}


def added(parts: Iterable[Mapping[str, float]]) -> Sums:
    """The sums of all parts, in the order given."""
    total: Sums = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total


def means(sums: Mapping[str, float]) -> dict[str, float]:
    """Accuracy and mean log-loss; of two classes also AUC, of tokens perplexity; nothing where no row has a label."""
    rows = sums.get("labelled", 0.0)
    if not rows:
        return {}
    found = {"accuracy": sums["correct"] / rows, "log_loss": sums["log_loss"] / rows}
    if "tokens" in sums:
        return {**found, "perplexity": exp(min(found["log_loss"], 700.0))}
    auc = _area_under_curve(sums)
    return found if auc is None else {**found, "auc": auc}


def _area_under_curve(sums: Mapping[str, float]) -> float | None:
    """The chance that a row of class 1 has higher log-odds than one of class 0, ties counting half; None of one class.

    Mann & Whitney 1947. Log-odds that are not finite have their place in the order as well, NaN before all others.
    """
    counted = [
        (float(name.removeprefix(prefix)), label, count)
        for label, prefix in enumerate(_ODDS)
        for name, count in sums.items()
        if name.startswith(prefix)
    ]
    below = wins = positives = 0.0
    for _, tied in groupby(sorted(counted, key=_place), key=_place):
        here = [0.0, 0.0]
        for _, label, count in tied:
            here[label] += count
        wins += here[1] * (below + here[0] / 2)
        below += here[0]
        positives += here[1]
    return wins / (below * positives) if below and positives else None


def _place(counted: tuple[float, int, float]) -> float:
    odds = counted[0]
    return odds if odds == odds else float("-inf")
