"""Causal language model: Radford et al., Language Models are Unsupervised Multitask Learners, 2019 (GPT-2), §2.3.

Pre-norm transformer blocks in which no position sees a later one, learned positions, a last LayerNorm, and a head whose
weights are the token embedding's. Defaults are the smallest published model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional

from pipeline.attention import READS_RESIDUAL, Block, BlockShape, embedded
from pipeline.models.base import Appearances, Family, Hyperparameters, Task
from pipeline.names import UNNAMED, Names
from pipeline.sites import InputSpace


class GPTParameters(Hyperparameters):
    """`layers` of `width` channels with `heads`, the hidden units `expansion` times as many, `dropout`."""

    layers: int = Field(default=12, ge=1, le=1024)
    width: int = Field(default=768, ge=1)
    heads: int = Field(default=12, ge=1)
    expansion: int = Field(default=4, ge=1)
    dropout: float = Field(default=0.1, ge=0, lt=1)

    @property
    def block(self) -> BlockShape:
        """The shape of each block; the authors' GELU is its tanh approximation."""
        return BlockShape(self.width, self.heads, self.expansion * self.width, self.dropout, gelu="tanh")


class GPT(Family):
    """Weights N(0, 0.02²), those that write to the residual stream divided by √(2 · layers), biases 0."""

    name: ClassVar[str] = "gpt"
    version: ClassVar[int] = 1
    parameters: ClassVar[type[Hyperparameters]] = GPTParameters
    objective: ClassVar[Literal["classes", "next token"]] = "next token"

    def build(self, parameters: GPTParameters, task: Task) -> nn.Module:
        """Embeddings → blocks → norm → tied head; ModelError where the heads do not divide the width."""
        self.expect(task, "tokens")
        network = _GPT(parameters, task)
        for name, value in network.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(value)
            elif "norm" not in name:
                writes = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(value, std=0.02 / (2 * parameters.layers) ** 0.5 if writes else 0.02)
        return network

    def inputs(self, parameters: GPTParameters, task: Task, names: Names = UNNAMED) -> Mapping[str, InputSpace]:
        """Layers read the normalised residual stream, those behind attention its heads."""
        spaces = {"token": InputSpace("residual", (parameters.width,))}
        for layer in range(parameters.layers):
            spaces |= parameters.block.inputs(f"blocks.{layer}")
        return spaces

    def appearances(self, module: _GPT, names: Names) -> Mapping[str, Appearances]:
        """To layers that read the residual stream a token is its embedding, normalised, as before the first block."""
        shown = Appearances(*embedded(module.token.weight, names))
        read = [f"blocks.{layer}.{name}" for layer in range(len(module.blocks)) for name in READS_RESIDUAL]
        return dict.fromkeys(["token", *read], shown)


class _GPT(nn.Module):
    def __init__(self, parameters: GPTParameters, task: Task) -> None:
        super().__init__()
        self.token = nn.Embedding(task.vocabulary, parameters.width)
        self.position = nn.Embedding(task.shape[0], parameters.width)
        self.dropout = nn.Dropout(parameters.dropout)
        self.blocks = nn.ModuleList(Block(parameters.block) for _ in range(parameters.layers))
        self.norm = nn.LayerNorm(parameters.width)

    def forward(self, token: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (N, T, vocabulary) of each position's next token. Padding stands behind, where nothing sees it."""
        position_T = torch.arange(token.shape[1], device=token.device)
        x_NTW = self.dropout(self.token(token) + self.position(position_T))
        for block in self.blocks:
            x_NTW = block(x_NTW, causal=True)
        return functional.linear(self.norm(x_NTW), self.token.weight)


FAMILY = GPT()
