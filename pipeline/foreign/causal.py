"""Whether a model of which nothing is known but what it computes says of each token which one comes next.

Layer 2: pure torch. N rows, T positions, V tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from pipeline.batch import Batch

# of what the change does where it may act: rounding is none in float32, and a layer that looks ahead passes on more
ROUNDING = 1e-4


@torch.no_grad()
def predicts_next(module: nn.Module, batch: Batch, show: Callable[[Batch], Batch], *, vocabulary: int) -> bool:
    """Whether it returns (N, T, V) of rows of tokens (N, T), and no position's depend on a token behind it.

    Other tokens in the second half of every row change nothing that it says of the first half. `show` is how it takes
    a batch. A masked language model, which returns the same shape, looks ahead.
    """
    token_NT = batch.inputs[0]
    if token_NT.ndim != 2 or token_NT.shape[1] < 2:
        return False
    half = token_NT.shape[1] // 2
    other_NT = torch.cat([token_NT[:, :half], (token_NT[:, half:] + 1) % vocabulary], 1)
    before, after = (
        show(replace(batch, inputs=(tokens, *batch.inputs[1:]))).forward(module) for tokens in (token_NT, other_NT)
    )
    if not isinstance(before, torch.Tensor) or before.ndim != 3:
        return False
    if before.shape[:2] != token_NT.shape or before.shape[2] < vocabulary:
        return False
    changed_NT = (after - before).abs().amax(2)
    return bool(changed_NT[:, :half].amax() <= ROUNDING * changed_NT[:, half:].amax())
