"""Small data sets and recipes for every family."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from pipeline.batch import Batch
from pipeline.fit.recipe import Recipe
from pipeline.fit.rows import Portion
from tests.models.build import EXAMPLES, NODES, Example, forward_inputs

CHUNKS = 3


def recipe(
    family: str = "mlp", *, seed: int = 0, hyperparameters: Mapping[str, Any] | None = None, **training: Any
) -> Recipe:
    """A recipe for the family's example."""
    example = EXAMPLES[family]
    chosen = example.hyperparameters if hyperparameters is None else hyperparameters
    return Recipe(
        family=family,
        family_version=1,
        hyperparameters=dict(chosen),
        training={"steps": 12, "batch_rows": 16, "learning_rate": 0.05} | training,
        seed=seed,
        shape=example.task.shape,
        outputs=example.task.outputs,
        chunks=tuple(f"chunk{number}" for number in range(CHUNKS)),
        dtype="float32",
        threads=1,
        deterministic=True,
        categories=example.task.categories,
        vocabulary=example.task.vocabulary,
    )


def portions(family: str = "mlp", rows: int = 120, dtype: torch.dtype = torch.float32) -> list[Portion]:
    """Rows whose label depends on their numbers, in CHUNKS chunks; of a graph its only batch."""
    if family == "gcn":
        # made beforehand: it seeds the generators of GPUs too
        whole = graph()
        return [Portion("chunk0", NODES, lambda: iter([whole]))]
    whole = batch(EXAMPLES[family], rows, dtype)
    size = rows // CHUNKS
    return [
        Portion(f"chunk{number}", size, lambda number=number: cut(whole, number * size, (number + 1) * size, 25))
        for number in range(CHUNKS)
    ]


def batch(example: Example, rows: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Batch:
    inputs = example.inputs(rows, seed)
    first = inputs[0].flatten(1).double()
    score = torch.stack([first.roll(shift, 1)[:, ::2].sum(1) for shift in range(max(1, example.task.outputs))], 1)
    label = score.argmax(1) if example.task.outputs != 2 else (first.sum(1) > 0).long()
    cast = tuple(one.to(dtype) if one.is_floating_point() else one for one in inputs)
    return Batch(cast, torch.arange(rows) + 1000 * seed, label if example.task.outputs else None)


def graph() -> Batch:
    inputs = forward_inputs("gcn")
    label = inputs[0].sum(1).sign().long() + 1
    label[-3:] = -1  # nodes of another split
    return Batch(inputs, torch.arange(NODES), label)


def cut(whole: Batch, start: int, stop: int, size: int) -> Iterator[Batch]:
    for begin in range(start, stop, size):
        part = slice(begin, min(begin + size, stop))
        label = None if whole.label_N is None else whole.label_N[part]
        yield replace(whole, inputs=tuple(one[part] for one in whole.inputs), uid_N=whole.uid_N[part], label_N=label)
