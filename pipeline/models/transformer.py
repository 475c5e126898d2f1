"""Transformer encoder that classifies sequences: Vaswani et al., Attention Is All You Need, NeurIPS 2017
(arXiv:1706.03762), in its pre-norm form (Xiong et al., ICML 2020, arXiv:2002.04745).

Token embeddings, blocks that see every real position, a last LayerNorm, the mean over real positions and a dense
classifier. Positions are learned and the hidden units are GELUs, as in BERT (Devlin et al. 2019, arXiv:1810.04805); the
paper has sinusoids and ReLUs. Layers, widths, heads and dropout are by default those of the paper's base model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import nn

from pipeline.attention import READS_RESIDUAL, Block, BlockShape, embedded
from pipeline.models.base import Appearances, Family, Hyperparameters, Task
from pipeline.names import UNNAMED, Names
from pipeline.sites import InputSpace


class TransformerParameters(Hyperparameters):
    """`layers` of `width` channels with `heads`, the hidden units `expansion` times as many, `dropout`."""

    layers: int = Field(default=6, ge=1, le=1024)
    width: int = Field(default=512, ge=1)
    heads: int = Field(default=8, ge=1)
    expansion: int = Field(default=4, ge=1)
    dropout: float = Field(default=0.1, ge=0, lt=1)

    @property
    def block(self) -> BlockShape:
        """The shape of each block."""
        return BlockShape(self.width, self.heads, self.expansion * self.width, self.dropout)


class Transformer(Family):
    """Glorot's uniform initialisation of the dense layers, embeddings N(0, 0.02²), biases 0."""

    name: ClassVar[str] = "transformer"
    version: ClassVar[int] = 1
    parameters: ClassVar[type[Hyperparameters]] = TransformerParameters

    def build(self, parameters: TransformerParameters, task: Task) -> nn.Module:
        """Embeddings → blocks → mean → dense; ModelError where the heads do not divide the width."""
        self.expect(task, "tokens")
        network = _Encoder(parameters, task)
        for module in network.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        return network

    def inputs(self, parameters: TransformerParameters, task: Task, names: Names = UNNAMED) -> Mapping[str, InputSpace]:
        """Layers read the normalised residual stream, those behind attention its heads."""
        spaces = {"classifier": InputSpace("residual", (parameters.width,))}
        for layer in range(parameters.layers):
            spaces |= parameters.block.inputs(f"blocks.{layer}")
        return spaces

    def appearances(self, module: _Encoder, names: Names) -> Mapping[str, Appearances]:
        """To layers that read the residual stream a token is its embedding, normalised, as before the first block."""
        shown = Appearances(*embedded(module.token.weight, names))
        read = [f"blocks.{layer}.{name}" for layer in range(len(module.blocks)) for name in READS_RESIDUAL]
        return dict.fromkeys(read, shown)


class _Encoder(nn.Module):
    def __init__(self, parameters: TransformerParameters, task: Task) -> None:
        super().__init__()
        self.token = nn.Embedding(task.vocabulary, parameters.width)
        self.position = nn.Embedding(task.shape[0], parameters.width)
        self.dropout = nn.Dropout(parameters.dropout)
        self.blocks = nn.ModuleList(Block(parameters.block) for _ in range(parameters.layers))
        self.norm = nn.LayerNorm(parameters.width)
        self.classifier = nn.Linear(parameters.width, task.outputs)

    def forward(self, token: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (N, outputs) of tokens (N, T); a row without a real position is taken to have its first."""
        position_T = torch.arange(token.shape[1], device=token.device)
        real_NT = torch.ones_like(token, dtype=torch.bool) if mask is None else mask | (position_T == 0)
        x_NTW = self.dropout(self.token(token) + self.position(position_T))
        for block in self.blocks:
            x_NTW = block(x_NTW, seen=None if mask is None else real_NT[:, None, None, :])
        share_NT = real_NT.to(x_NTW.dtype) / real_NT.sum(1, keepdim=True)
        return self.classifier((self.norm(x_NTW) * share_NT[:, :, None]).sum(1))  # type: ignore[no-any-return]


FAMILY = Transformer()
