"""What a run needs to know of a model wherever it comes from: a training of the job, or a file.

Layer 3. Nothing above asks which of the two it is but who trains and who loads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from pipeline.batch import Batch
from pipeline.errors import ModelError, is_machines_fault
from pipeline.fit.objective import Objective
from pipeline.fit.recipe import Recipe
from pipeline.foreign.causal import predicts_next
from pipeline.foreign.load import restored
from pipeline.foreign.origin import Loaded, Untrained
from pipeline.models.base import Appearances, Checkpoint, Family, Task, example
from pipeline.names import Names
from pipeline.registry import families
from pipeline.sites import InputSpace

Origin = Recipe | Loaded | Untrained


def shape_of(origin: Origin) -> str:
    """The same for models whose sites are alike; programs of one entry are taken to be."""
    match origin:
        case Recipe():
            return repr((origin.family, origin.hyperparameters, origin.task, origin.dtype))
        case _:
            return repr((origin.architecture.id, origin.dtype))


def made(origin: Origin) -> nn.Module:
    """A module of that shape in eval mode, with any weights. ModelError or DataError where it cannot be."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        match origin:
            case Recipe():
                module = origin.build()
            case Loaded():
                module = origin.module()
            case Untrained():
                module = origin.architecture.build()
        return module.to(getattr(torch, origin.dtype)).eval()


def made_up(origin: Origin, rows: int) -> Batch:
    """A batch of made-up rows that the model takes."""
    dtype, uid_N = getattr(torch, origin.dtype), torch.arange(rows)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        match origin:
            case Recipe():
                return Batch(origin.kind.example(origin.task, rows, dtype), uid_N)
            case _:
                return origin.architecture.call.shown(Batch(_example(origin, rows, dtype), uid_N))


def _example(origin: Loaded | Untrained, rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    name, task = origin.architecture.spec.family, origin.architecture.task
    return families()[name].example(task, rows, dtype) if name else example(task, rows, dtype)


def shown(origin: Origin, batch: Batch) -> Batch:
    """The batch as the model takes it."""
    return batch if isinstance(origin, Recipe) else origin.architecture.call.shown(batch)


def module_of(origin: Origin, checkpoint: Checkpoint) -> nn.Module:
    """The model of a stored checkpoint, in eval mode. ModelError where it does not fit."""
    if isinstance(origin, Recipe):
        with torch.random.fork_rng(devices=[]):
            module = origin.build().to(getattr(torch, origin.dtype))
        try:
            module.load_state_dict(checkpoint.weights)
        except RuntimeError as error:
            if is_machines_fault(error):
                raise
            raise ModelError(f"its checkpoint does not fit: {error}") from error
        return module.eval()
    return restored(origin.architecture, checkpoint, getattr(torch, origin.dtype))


def task_of(origin: Origin) -> Task:
    """What the model is for."""
    return origin.task if isinstance(origin, Recipe) else origin.architecture.task


def objective_of(origin: Origin, module: nn.Module, rows: Callable[[], Batch]) -> Objective:
    """What its outputs are scored as; where nothing says it, as it answers some rows of the data."""
    name, _ = _family_of(origin)
    if name is not None:
        return families()[name].objective  # type: ignore[no-any-return]
    assert not isinstance(origin, Recipe)
    architecture = origin.architecture
    if architecture.config is None and architecture.task.kind == "tokens":
        next_token = predicts_next(module, rows(), architecture.call.shown, vocabulary=architecture.task.vocabulary)
        return "next token" if next_token else "classes"
    return architecture.objective


def family_of(origin: Origin) -> Family | None:
    """The family that builds it, None of models that come as they are."""
    name, _ = _family_of(origin)
    return None if name is None else families()[name]


def inputs_of(origin: Origin, names: Names) -> Mapping[str, InputSpace]:
    """What the family says of the inputs of its sites, by the path of their weight."""
    name, given = _family_of(origin)
    if name is None:
        return {}
    family = families()[name]
    return family.inputs(family.parameters(**given), task_of(origin), names)  # type: ignore[no-any-return]


def appearances_of(origin: Origin, module: nn.Module, names: Names) -> Mapping[str, Appearances]:
    """What the family says of how things look to its sites, by the path of their weight."""
    name, _ = _family_of(origin)
    return {} if name is None else families()[name].appearances(module, names)


def _family_of(origin: Origin) -> tuple[str | None, Mapping[str, Any]]:
    if isinstance(origin, Recipe):
        return origin.family, origin.hyperparameters
    return origin.architecture.spec.family, origin.architecture.spec.arguments


def columns_of(origin: Origin) -> dict[str, Any]:
    """What the table of models says of where a model comes from."""
    match origin:
        case Recipe():
            return {
                "family": origin.family,
                "seed": origin.seed,
                "lineage": origin.lineage,
                "hyperparameters": json.dumps(origin.hyperparameters, sort_keys=True),
                "training": json.dumps(origin.training, sort_keys=True),
            }
        case Loaded():
            return {**_built(origin), "loaded_from": ", ".join(origin.named)}
        case Untrained():
            return {**_built(origin), "seed": origin.seed}


def _built(origin: Loaded | Untrained) -> dict[str, Any]:
    arguments = json.dumps(origin.architecture.spec.arguments, sort_keys=True)
    return {"family": origin.architecture.label, "hyperparameters": arguments}
