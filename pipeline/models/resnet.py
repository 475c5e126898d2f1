"""Residual network for small images: He, Zhang, Ren & Sun, Deep Residual Learning, CVPR 2016, §4.2 (arXiv:1512.03385).

A 3 × 3 stem, stages of basic blocks that halve the image and widen the channels, global average pooling and a dense
classifier. With the paper's three stages the depth is 6n + 2: 20, 32, 44, 56, 110. In general it is 2sn + 2 for s
stages of n blocks; ResNet-18 for small images is `depth = 18, widths = [64, 128, 256, 512], shortcut = "B"`.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import nn
from torch.nn import functional

from pipeline.errors import ModelError
from pipeline.models.base import Family, Hyperparameters, Task


class ResNetParameters(Hyperparameters):
    """`depth` in weighted layers, `widths` of the stages in channels.

    `shortcut` where a block changes the shape: "A" drops every other pixel and adds channels of zeros (the paper's
    choice for CIFAR-10, without parameters), "B" is a 1 × 1 convolution with BatchNorm.
    """

    depth: int = Field(default=20, ge=4, le=1202)
    widths: tuple[PositiveInt, ...] = Field(default=(16, 32, 64), min_length=1, strict=False)
    shortcut: Literal["A", "B"] = "A"


class ResNet(Family):
    """Basic blocks, convolutions without biases, He's normal initialisation (fan-out, as in the authors' code)."""

    name: ClassVar[str] = "resnet"
    version: ClassVar[int] = 1
    parameters: ClassVar[type[Hyperparameters]] = ResNetParameters

    def build(self, parameters: ResNetParameters, task: Task) -> nn.Module:
        """Stem → stages → pooling → dense; ModelError where the depth does not divide into the stages."""
        self.expect(task, "image")
        stages = len(parameters.widths)
        blocks, rest = divmod(parameters.depth - 2, 2 * stages)
        if rest:
            raise ModelError(
                f"family resnet: depth {parameters.depth} is not 2 · {stages} stages · n blocks + 2; "
                f"expected {2 * stages * max(blocks, 1) + 2} or {2 * stages * (blocks + 1) + 2}"
            )
        network = _ResNet(parameters, blocks, task)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        return network


class _ResNet(nn.Module):
    def __init__(self, parameters: ResNetParameters, blocks: int, task: Task) -> None:
        super().__init__()
        width = parameters.widths[0]
        self.stem = _convolution(task.shape[0], width)
        self.stem_norm = nn.BatchNorm2d(width)
        layers: list[nn.Module] = []
        for stage, units in enumerate(parameters.widths):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(_Block(width, units, stride, parameters.shortcut))
                width = units
        self.blocks = nn.Sequential(*layers)
        self.classifier = nn.Linear(width, task.outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.stem_norm(self.stem(x)))
        return self.classifier(self.blocks(x).mean((2, 3)))  # type: ignore[no-any-return]


class _Block(nn.Module):
    def __init__(self, channels: int, units: int, stride: int, shortcut: Literal["A", "B"]) -> None:
        super().__init__()
        self.conv1 = _convolution(channels, units, stride)
        self.norm1 = nn.BatchNorm2d(units)
        self.conv2 = _convolution(units, units)
        self.norm2 = nn.BatchNorm2d(units)
        self.shortcut: nn.Module
        if stride == 1 and channels == units:
            self.shortcut = nn.Identity()
        elif shortcut == "A":
            self.shortcut = _Subsample(units - channels, stride)
        else:
            projection = nn.Conv2d(channels, units, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(units))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = functional.relu(self.norm1(self.conv1(x)))
        made = self.norm2(self.conv2(made))
        return functional.relu(made + self.shortcut(x))


class _Subsample(nn.Module):
    """The parameter-free shortcut: every `stride`-th pixel, and `extra` channels of zeros behind."""

    def __init__(self, extra: int, stride: int) -> None:
        super().__init__()
        self.extra, self.stride = extra, stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))


def _convolution(channels: int, units: int, stride: int = 1) -> nn.Conv2d:
    # BatchNorm carries the bias
    return nn.Conv2d(channels, units, 3, stride=stride, padding=1, bias=False)


FAMILY = ResNet()
