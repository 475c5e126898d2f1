"""The pre-norm transformer block that the transformer families share, from plain dense layers.

Layer 1: single-device PyTorch. Vaswani et al. 2017 (arXiv:1706.03762), normalised before each part instead of behind it
(Xiong et al. 2020, arXiv:2002.04745). Queries, keys and values have a layer each, so that each is a site by its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from pipeline.errors import ModelError
from pipeline.names import Names
from pipeline.sites import InputSpace

# the layers of a block that see the residual stream, behind a norm
READS_RESIDUAL = ("query", "key", "value", "up")


@dataclass(frozen=True)
class BlockShape:
    """`width` of the residual stream, attention `heads`, `hidden` units, share of `dropout`, flavour of the `gelu`."""

    width: int
    heads: int
    hidden: int
    dropout: float
    gelu: Literal["none", "tanh"] = "none"

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ModelError(f"{self.heads} heads do not divide a width of {self.width}")

    def inputs(self, path: str) -> dict[str, InputSpace]:
        """What the layers of the block at `path` read: the residual stream or, the one behind attention, heads."""
        spaces = {f"{path}.{name}": InputSpace("residual", (self.width,)) for name in READS_RESIDUAL}
        return spaces | {f"{path}.out": InputSpace("heads", (self.heads, self.width // self.heads))}


class Block(nn.Module):
    """x + attention(norm(x)), then x + dense(GELU(dense(norm(x)))), with dropout before each addition."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        width = shape.width
        self.heads = shape.heads
        self.attention_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.dense_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, shape.hidden)
        self.gate = nn.GELU(approximate=shape.gelu)
        self.down = nn.Linear(shape.hidden, width)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, x_NTW: torch.Tensor, seen: torch.Tensor | None = None, causal: bool = False) -> torch.Tensor:
        """`seen` (bool, broadcast to (N, heads, T, T)): where each position may look; `causal`: at none behind it."""
        x_NTW = x_NTW + self.dropout(self._attended(self.attention_norm(x_NTW), seen, causal))
        return x_NTW + self.dropout(self.down(self.gate(self.up(self.dense_norm(x_NTW)))))  # type: ignore[no-any-return]

    def _attended(self, x_NTW: torch.Tensor, seen: torch.Tensor | None, causal: bool) -> torch.Tensor:
        query, key, value = (
            layer(x_NTW).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        share = self.dropout.p if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, dropout_p=share, is_causal=causal
        )
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def embedded(token_VW: torch.Tensor, names: Names) -> tuple[tuple[str, ...], torch.Tensor]:
    """The names of V tokens, and each one's embedding behind a LayerNorm without gain: (V, W).

    What a weight vector of the residual stream makes of them is what it says in tokens (Dar et al. 2023,
    arXiv:2209.02535).
    """
    x_VW = functional.layer_norm(token_VW.detach(), token_VW.shape[1:])
    return tuple(names.token(number) for number in range(len(token_VW))), x_VW
