"""A recipe: everything that decides the weights of one training, so that its models have names before anything runs.

Layer 2.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from pipeline.errors import ModelError
from pipeline.fit.learners import can_stack
from pipeline.fit.settings import Training
from pipeline.hashing import digest
from pipeline.models.base import Family, Task
from pipeline.registry import families

# raised whenever the same recipe would give other weights
RECIPE_VERSION = 4


@dataclass(frozen=True)
class Recipe:
    """What decides the weights of one training; its digest is the lineage of its checkpoints.

    `shape`, `outputs`, `categories` and `vocabulary` are the task's, `chunks` the ids of the training data.
    """

    family: str
    family_version: int
    hyperparameters: dict[str, Any]
    training: dict[str, Any]
    seed: int
    shape: tuple[int, ...]
    outputs: int
    chunks: tuple[str, ...]
    dtype: str
    threads: int
    deterministic: bool
    categories: tuple[int, ...] = ()
    vocabulary: int = 0

    @cached_property
    def lineage(self) -> str:
        """Name of the training that all its checkpoints share."""
        return digest([RECIPE_VERSION, asdict(self)])

    @cached_property
    def settings(self) -> Training:
        """The training table, read."""
        return Training(**self.training)

    @cached_property
    def group(self) -> str:
        """The same for recipes of one shape on the same rows that may train together, else its own."""
        rates = dict.fromkeys(("learning_rate", "weight_decay"))
        shared = replace(self, seed=0, training=self.training | rates)
        with torch.device("meta"):
            together = can_stack(self.kind, self.build(), self.settings)
        return digest(asdict(shared)) if together else self.lineage

    @cached_property
    def beginning(self) -> str:
        """The same for recipes whose models are the same before the first step: equal weights, scored on equal rows."""
        rows = {"held_out": self.settings.held_out, "batch_rows": self.settings.batch_rows}
        return digest(asdict(replace(self, training=rows)))

    @property
    def kind(self) -> Family:
        """Its family."""
        return families()[self.family]  # type: ignore[no-any-return]

    @cached_property
    def parameters(self) -> Any:
        """The family's hyperparameters, read."""
        return self.kind.parameters(**self.hyperparameters)

    @property
    def task(self) -> Task:
        """What its model is for."""
        return Task(tuple(self.shape), self.outputs, tuple(self.categories), self.vocabulary)

    @property
    def steps(self) -> int:
        """The last step."""
        return self.settings.steps

    @property
    def checkpoints(self) -> tuple[int, ...]:
        """The steps whose models are kept: 0, those asked for, and the last."""
        return (0, *self.settings.checkpoints, self.steps)

    def model_id(self, step: int) -> str:
        """Name of the model after `step` steps; 0 is the untrained twin."""
        return digest([self.lineage, step])

    def build(self) -> nn.Module:
        """The family's module, its weights as the current random state gives them. ModelError where it cannot be."""
        if self.settings.neighbours and not self.kind.whole:
            raise ModelError(f"family {self.family} draws no neighbours: leave training.neighbours out")
        if self.settings.autocast != "none" and self.dtype == "float64":
            raise ModelError('training.autocast lowers float32 alone: leave it out, or numerics.dtype = "float64"')
        return self.kind.build(self.parameters, self.task)
