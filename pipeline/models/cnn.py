"""Small convolutional network: blocks of convolution, BatchNorm and ReLU that halve the image, then a dense layer.

LeCun, Bottou, Bengio & Haffner, Gradient-based learning applied to document recognition, Proc. IEEE 86 (1998), with
what has come after its tanh and subsampling: ReLU and max-pooling (Krizhevsky, Sutskever & Hinton, NeurIPS 2012) and
BatchNorm (Ioffe & Szegedy, ICML 2015, arXiv:1502.03167).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import ClassVar

from pydantic import Field, PositiveInt
from torch import nn

from pipeline.errors import ModelError
from pipeline.models.base import Family, Hyperparameters, Task


class CNNParameters(Hyperparameters):
    """Hyperparameters of the CNN: `widths` of the blocks in channels, the odd `kernel` size in pixels."""

    widths: tuple[PositiveInt, ...] = Field(default=(16, 32), min_length=1, strict=False)
    kernel: int = Field(default=3, ge=1)


class CNN(Family):
    """Blocks of 3 × 3 convolution → BatchNorm → ReLU → 2 × 2 max-pooling."""

    name: ClassVar[str] = "cnn"
    version: ClassVar[int] = 1
    parameters: ClassVar[type[Hyperparameters]] = CNNParameters

    def build(self, parameters: CNNParameters, task: Task) -> nn.Module:
        """Blocks, then one dense layer on what is left of the image."""
        self.expect(task, "image")
        channels, height, width = task.shape
        layers: dict[str, nn.Module] = {}
        for index, units in enumerate(parameters.widths):
            layers[f"block{index}"] = _block(channels, units, parameters.kernel)
            channels, height, width = units, height // 2, width // 2
        if height * width == 0:
            raise ModelError(f"family cnn: {len(parameters.widths)} blocks halve a {task.shape[1:]} image to nothing")
        classifier = nn.Linear(channels * height * width, task.outputs)
        return nn.Sequential(OrderedDict(layers, flatten=nn.Flatten(), classifier=classifier))


def _block(channels: int, units: int, kernel: int) -> nn.Module:
    # BatchNorm carries the bias
    conv = nn.Conv2d(channels, units, kernel, padding=kernel // 2, bias=False)
    layers = OrderedDict(conv=conv, norm=nn.BatchNorm2d(units), gate=nn.ReLU(inplace=True), pool=nn.MaxPool2d(2))
    return nn.Sequential(layers)


FAMILY = CNN()
