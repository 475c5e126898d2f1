"""Temporal convolutional network: Bai, Kolter & Koltun, An Empirical Evaluation of Generic Convolutional and Recurrent
Networks for Sequence Modeling, 2018 (arXiv:1803.01271), §3.

Residual blocks of two causal convolutions, the dilation doubling from block to block, each with weight normalisation,
ReLU and spatial dropout; a dense classifier reads the last time step. Defaults are those of the authors' code for
sequential MNIST.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field, PositiveInt
from torch import nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from pipeline.models.base import Family, Hyperparameters, Task
from pipeline.names import UNNAMED, Names
from pipeline.sites import InputSpace


class TCNParameters(Hyperparameters):
    """`widths` of the blocks in channels, `kernel` size in (dilated) time steps, `dropout` of whole channels."""

    widths: tuple[PositiveInt, ...] = Field(default=(25,) * 8, min_length=1, strict=False)
    kernel: int = Field(default=7, ge=2)
    dropout: float = Field(default=0.05, ge=0, lt=1)


class TCN(Family):
    """Block i has dilation 2ⁱ; the output at time t sees 1 + 2 (kernel − 1)(2^blocks − 1) steps, none behind t.

    PyTorch's default initialisation, as in the authors' code (weight normalisation undoes their N(0, 0.01) on the
    convolutions). Dropout is of whole channels, as in the paper; their code drops single elements.
    """

    name: ClassVar[str] = "tcn"
    version: ClassVar[int] = 1
    parameters: ClassVar[type[Hyperparameters]] = TCNParameters

    def build(self, parameters: TCNParameters, task: Task) -> nn.Module:
        """Blocks, then a dense layer on the last time step that is no padding."""
        self.expect(task, "series")
        return _TCN(parameters, task)

    def inputs(self, parameters: TCNParameters, task: Task, names: Names = UNNAMED) -> Mapping[str, InputSpace]:
        """Each tap of a convolution looks some steps back; the classifier at the last step of the last block."""
        spaces = {}
        channels = [names.feature(channel, "channel") for channel in range(task.shape[0])]
        for block, units in enumerate(parameters.widths):
            within = [f"conv1 {unit}" for unit in range(units)]
            for name, shown in (("conv1", channels), ("conv2", within)):
                spaces[f"blocks.{block}.{name}"] = _lags(shown, parameters.kernel, 2**block)
            if len(channels) != units:
                spaces[f"blocks.{block}.shortcut"] = InputSpace("lags", (len(channels), 1), tuple(channels))
            channels = [f"blocks.{block} {unit}" for unit in range(units)]
        return {**spaces, "classifier": InputSpace("residual", (len(channels),), tuple(channels))}


def _lags(channels: Sequence[str], kernel: int, dilation: int) -> InputSpace:
    lags = [dilation * back for back in range(kernel - 1, -1, -1)]
    names = tuple(f"{channel}, {lag} back" for channel in channels for lag in lags)
    return InputSpace("lags", (len(channels), kernel), names)


class _TCN(nn.Module):
    def __init__(self, parameters: TCNParameters, task: Task) -> None:
        super().__init__()
        widths = (task.shape[0], *parameters.widths)
        self.blocks = nn.ModuleList(
            _Block(widths[block], widths[block + 1], parameters.kernel, 2**block, parameters.dropout)
            for block in range(len(parameters.widths))
        )
        self.classifier = nn.Linear(widths[-1], task.outputs)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        if mask is None:
            return self.classifier(x[:, :, -1])  # type: ignore[no-any-return]
        last_NC1 = (mask.sum(1) - 1).clamp(min=0)[:, None, None].expand(-1, x.shape[1], 1)
        return self.classifier(x.gather(2, last_NC1)[:, :, 0])  # type: ignore[no-any-return]


class _Block(nn.Module):
    def __init__(self, channels: int, units: int, kernel: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.before = (kernel - 1) * dilation
        self.conv1 = weight_norm(nn.Conv1d(channels, units, kernel, dilation=dilation))
        self.conv2 = weight_norm(nn.Conv1d(units, units, kernel, dilation=dilation))
        self.dropout = nn.Dropout1d(dropout)
        self.shortcut = nn.Identity() if channels == units else nn.Conv1d(channels, units, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.dropout(functional.relu(self.conv1(self._behind(x))))
        made = self.dropout(functional.relu(self.conv2(self._behind(made))))
        return functional.relu(made + self.shortcut(x))

    def _behind(self, x: torch.Tensor) -> torch.Tensor:
        """Zeros before the beginning: nothing that comes later is ever seen."""
        return functional.pad(x, (self.before, 0))


FAMILY = TCN()
