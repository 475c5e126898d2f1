"""Multilayer perceptron: dense layers with a nonlinearity between them, over the flattened input.

Rumelhart, Hinton & Williams, Learning representations by back-propagating errors, Nature 323 (1986), with rectified
linear units by default (Glorot, Bordes & Bengio, AISTATS 2011).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from itertools import pairwise
from math import prod
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import nn

from pipeline.models.base import Family, Hyperparameters, StackedForward, Task
from pipeline.names import UNNAMED, Names
from pipeline.sites import InputSpace

GATES: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}


class MLPParameters(Hyperparameters):
    """Hyperparameters of the MLP: `widths` of the hidden layers in units, the `gate` behind each."""

    widths: tuple[PositiveInt, ...] = Field(default=(128, 64), min_length=1, strict=False)
    gate: Literal["relu", "gelu", "tanh"] = "relu"


class MLP(Family):
    """Dense layers with PyTorch's default initialisation (Kaiming uniform, a = √5)."""

    name: ClassVar[str] = "mlp"
    version: ClassVar[int] = 1
    parameters: ClassVar[type[Hyperparameters]] = MLPParameters
    stacks: ClassVar[bool] = True

    def build(self, parameters: MLPParameters, task: Task) -> nn.Module:
        """Flatten → (dense → gate)* → dense."""
        self.expect(task, "image", "series", "numbers")
        sizes = (prod(task.shape), *parameters.widths)
        layers: dict[str, nn.Module] = {"flatten": nn.Flatten()}
        for index, (fan_in, units) in enumerate(pairwise(sizes)):
            layers[f"hidden{index}"] = nn.Linear(fan_in, units)
            layers[f"gate{index}"] = GATES[parameters.gate]()
        return nn.Sequential(OrderedDict(layers, classifier=nn.Linear(sizes[-1], task.outputs)))

    def inputs(self, parameters: MLPParameters, task: Task, names: Names = UNNAMED) -> Mapping[str, InputSpace]:
        """Columns of numbers have names."""
        if task.kind != "numbers":
            return {}
        first = "hidden0" if parameters.widths else "classifier"
        return {first: InputSpace("features", task.shape, tuple(names.feature(i) for i in range(task.shape[0])))}

    def stacked(self, module: nn.Module) -> StackedForward:
        """Batched products of the weights with the rows as columns: their gradients then lie as the weights do.

        `vmap` multiplies the other way round, and every gradient has to be turned (a fifth of a step of 64 models).
        """
        gates = [layer for layer in module.children() if not isinstance(layer, nn.Flatten | nn.Linear)]

        def forward(weights: dict[str, torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
            (x_GN,) = args
            a_GUN = x_GN.flatten(2).mT
            for index, gate in enumerate(gates):
                a_GUN = gate(_affine(a_GUN, weights, f"hidden{index}"))
            return _affine(a_GUN, weights, "classifier").mT

        return forward


def _affine(x_GDN: torch.Tensor, weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return torch.baddbmm(weights[f"{name}.bias"][:, :, None], weights[f"{name}.weight"], x_GDN)


FAMILY = MLP()
