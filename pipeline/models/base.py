"""The contract of a model family, and a checkpoint as one object. One file `models/NAME.py` with FAMILY adds one.

Layer 2: single-device PyTorch that knows nothing of clusters; a family imports this file and what is below, never a
sibling. A family builds modules; how they are trained is `training.py`.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load, save
from torch import nn
from torch.func import functional_call, vmap

from pipeline.errors import ModelError, SpoiltObject, is_machines_fault
from pipeline.names import UNNAMED, Names
from pipeline.sites import InputSpace

Kind = Literal["image", "series", "numbers", "categories", "tokens"]


class Hyperparameters(BaseModel):
    """Base of a family's hyperparameters: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


@dataclass(frozen=True)
class Task:
    """What a model is for, as the data says it; a family refuses what it cannot take.

    shape       of one row's numbers: (C, H, W) of an image, (C, T) of a series, (D,) of a table's numeric columns or of
                a node's features, (T,) of a sequence of at most T tokens
    outputs     number of classes; 0 where there is nothing to classify
    categories  number of values of each categorical column
    vocabulary  number of different tokens; 0 where rows are not tokens

    What the built module's forward takes (N rows, K categorical columns, V nodes, E edges):

    images, plain tables     x (N, *shape)
    series                   x (N, C, T) and, where rows differ in length, mask (N, T)
    tables with categories   x (N, D) and category (N, K), int64
    tokens                   token (N, T), int64, and, where rows differ in length, mask (N, T)
    graphs                   x (V, D) and edge (2, E), int64: the whole graph is one batch, labels −1 where unknown

    A mask is True where a position is real. A classifier returns logits (N, outputs), a language model logits
    (N, T, vocabulary). In eval mode it does the same in every forward, whatever it was given before.
    """

    shape: tuple[int, ...]
    outputs: int
    categories: tuple[int, ...] = ()
    vocabulary: int = 0

    @property
    def kind(self) -> Kind:
        """What a row is."""
        if self.vocabulary:
            return "tokens"
        if self.categories:
            return "categories"
        return {3: "image", 2: "series"}.get(len(self.shape), "numbers")  # type: ignore[return-value]


def example(task: Task, rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Made-up inputs of a task, not of a graph: that many rows, drawn from torch's default generator."""
    if task.vocabulary:
        return (torch.randint(task.vocabulary, (rows, *task.shape)),)
    x = torch.randn(rows, *task.shape, dtype=dtype)
    if task.categories:
        return x, torch.stack([torch.randint(values, (rows,)) for values in task.categories], 1)
    return (x,)


# (weights by name, arguments, keyword arguments), every tensor with an axis of models first → what each returns
StackedForward = Callable[[dict[str, torch.Tensor], tuple[Any, ...], dict[str, Any]], Any]


class Neighbourhoods(ABC):
    """The rows of a batch that others depend on, drawn at random."""

    @abstractmethod
    def draw(self, row_N: torch.Tensor, counts: Sequence[int], seed: int) -> tuple[torch.Tensor, tuple[Any, ...]]:
        """Some rows and up to `counts[i]` neighbours of each of those i steps away: their numbers and inputs."""


class Family(ABC):
    """How to build one kind of model. `version` changes whenever the same hyperparameters would give other weights.

    objective  "classes": cross-entropy of the labels; "next token": of each position's successor
    whole      its rows depend on each other (a graph): it trains on batches as the source gives them
    stacks     models of one shape may train together; only where their weights then stay the same to the bit
    """

    name: ClassVar[str]
    version: ClassVar[int]
    parameters: ClassVar[type[Hyperparameters]]
    objective: ClassVar[Literal["classes", "next token"]] = "classes"
    whole: ClassVar[bool] = False
    stacks: ClassVar[bool] = False

    @abstractmethod
    def build(self, parameters: Any, task: Task) -> nn.Module:
        """The module with freshly initialised weights, drawn from torch's default generator, or ModelError."""

    def prepare(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Inputs that the model takes as well as these, with what is the same in every forward computed once."""
        return inputs

    def stacked(self, module: nn.Module) -> StackedForward:
        """The forward of models with the shape of `module`, many at once; override it where it can be faster."""
        return vmap(lambda weights, args, kwargs: functional_call(module, weights, args, kwargs))

    def neighbourhoods(self, inputs: tuple[Any, ...]) -> Neighbourhoods:
        """What rows depend on, to train on some of them: of families that are `whole`. ModelError for the others."""
        raise ModelError(f"family {self.name} draws no neighbours: leave training.neighbours out")

    def example(self, task: Task, rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Made-up inputs of that many rows, drawn from torch's default generator."""
        return example(task, rows, dtype)

    def expect(self, task: Task, *kinds: Kind) -> None:
        """ModelError unless the task's rows are of one of these kinds."""
        if task.kind not in kinds:
            raise ModelError(
                f"family {self.name} takes {' or '.join(kinds)}, the data has {task.kind} of shape {task.shape}"
            )

    def inputs(self, parameters: Any, task: Task, names: Names = UNNAMED) -> Mapping[str, InputSpace]:
        """What the inputs of a site mean where the data flow cannot show it, by the path of the site's weight."""
        return {}

    def appearances(self, module: Any, names: Names) -> Mapping[str, Appearances]:
        """What things of the model's input look like to sites that see them embedded, by the path of their weight."""
        return {}


@dataclass(frozen=True, eq=False)
class Appearances:
    """T things that people can name (tokens, values of fields), and x_TD as a site is shown each of them, alone."""

    names: tuple[str, ...]
    x_TD: torch.Tensor


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Weights and the record of where they come from."""

    weights: dict[str, torch.Tensor]
    record: dict[str, Any]


def checkpoint_key(model: str) -> str:
    """Where the checkpoint of a model id is stored."""
    return f"models/{model}.safetensors"


def encode_checkpoint(checkpoint: Checkpoint) -> bytes:
    """One safetensors object; equal checkpoints give equal bytes (one metadata entry: several have no fixed order)."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in checkpoint.weights.items()}
    return save(tensors, metadata={"record": json.dumps(checkpoint.record, sort_keys=True)})


def decode_checkpoint(content: bytes, *, key: str = "a checkpoint") -> Checkpoint:
    """Read a stored checkpoint back; SpoiltObject if it is damaged: its model is not at fault. Nothing is unpickled."""
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        record = json.loads(header["__metadata__"]["record"])
        return Checkpoint(weights=load(content), record=record)
    except Exception as error:  # safetensors raises several kinds
        if is_machines_fault(error):
            raise
        raise SpoiltObject(f"{key} is damaged ({error}); delete it and run again") from error
