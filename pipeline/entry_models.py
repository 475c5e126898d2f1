"""The models that an entry stands for on the data that it names, each followed by its untrained twin.

Layer 3. No row is read; what a model's weights will be from is known all the same, and its id with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pipeline.devices import machine_bytes
from pipeline.entries import LoadEntry, TrainEntry, seed_of
from pipeline.errors import CensusError, DataError, JobError, ModelError, StoreError, nearest
from pipeline.fit.recipe import Recipe
from pipeline.foreign.entry import Place, loaded_models, twins
from pipeline.job import Job, misfit, refusal
from pipeline.models.base import Family, Task
from pipeline.names import UNNAMED
from pipeline.registry import families
from pipeline.run_models import Model
from pipeline.sites import InputSpace
from pipeline.sources.base import RowGroupSource, Source
from pipeline.store import Store

# of each weight while it is trained: itself, its gradient, and at least one number of the optimizer
COPIES = 3
# made up to try a model with
ROWS = 2


def models_of(job: Job, entry: TrainEntry | LoadEntry, source: Source, store: Store) -> list[Model]:
    """The models of an entry, each training's followed by its untrained twin. JobError where they cannot be."""
    if isinstance(entry, TrainEntry):
        return _trained(job, entry, source)
    return _loaded(job, entry, source, store)


def _loaded(job: Job, entry: LoadEntry, source: Source, store: Store) -> list[Model]:
    """The models that an entry's files are, and behind them the untrained twin of each architecture."""
    where, spec, load = entry.where, entry.spec, entry.load
    task = Task(tuple(source.shape), source.classes, tuple(source.categories), source.vocabulary)
    if load.family is not None:
        family = families()[load.family]
        _refuse_unfit_data(job, where, spec.data, family, source)
        _try_to_describe(job, where, family, family.parameters(**load.arguments), task)
    place = Place(spec.located(load.url), spec.named)
    chunks = source.chunks(job.data[spec.data].train) or source.chunks(job.data[spec.data].measure[0])
    with _named(job, f"{where}.load"):
        found, pin = loaded_models(load, place, task, dtype=job.numerics.dtype, store=store)
    if load.sha256 not in (None, pin):
        raise misfit(job, f"{where}.load.sha256", load.sha256, f"the sha256 of what is there, {pin}")
    with _named(job, f"{where}.load"):
        made = twins(found, seed=seed_of(job, 0), data=spec.data, chunks=chunks, numerics=job.numerics)
    controls = made if spec.control else {}
    models = []
    for name, origin in found.items():
        twin = controls.get(origin.architecture)
        named = name if spec.name is None else f"{spec.name}-{name}"
        models.append(Model(origin.id, named, spec.data, origin, None, twin.id if twin else None, None, where))
    for architecture, twin in controls.items():
        base = spec.name or (architecture.label or "").rpartition(":")[2]
        several = "" if len(controls) == 1 else f"-{twin.id[:8]}"
        models.append(Model(twin.id, f"{base}{several}-init", spec.data, twin, 0, None, architecture.id, where))
    return models


@contextmanager
def _named(job: Job, where: str) -> Iterator[None]:
    """Say which entry asks for what cannot be."""
    try:
        yield
    except (JobError, ModelError) as error:
        raise refusal(job, where, str(error)) from error
    except (DataError, StoreError) as error:
        raise type(error)(str(refusal(job, where, str(error)))) from error


def _refuse_unfit_data(job: Job, where: str, data: str, family: Family, source: Source) -> None:
    if family.whole != source.whole:
        takes = "a graph" if family.whole else "single rows"
        raise misfit(job, f"{where}.data", data, f"data of {takes}, which family {family.name} takes")
    if family.objective == "classes" and not source.classes:
        tells = f"data with classes, which family {family.name} tells apart"
        raise misfit(job, f"{where}.data", data, f"{tells}: classes = … (or labels), and columns.label to learn them")


def _trained(job: Job, entry: TrainEntry, source: Source) -> list[Model]:
    """The trained models of an entry, one for each seed, each followed by its untrained twin."""
    data = entry.spec.data
    _refuse_unfit_data(job, entry.where, data, entry.family, source)
    _refuse_without_label(job, entry, source)
    _refuse_labelled_positions(job, entry, source)
    train = job.data[data].train
    chunks = source.chunks(train)
    if not chunks:
        refuse_without_rows(job, data, train, source)
        raise misfit(
            job, f"data.{data}.train", train, f"a split with rows to train on; {nearest(train, source.splits())}"
        )
    # one tuple for all: a task of eight models carries it once
    trained_on = tuple(chunk.id for chunk in chunks)
    recipes = [_recipe(job, entry, source, trained_on, seed=seed) for seed in entry.spec.seeds]
    _try_to_build(job, entry.where, recipes[0])
    named = zip(recipes, entry.spec.seeds, strict=True)
    return [model for recipe, seed in named for model in _lineage(entry, recipe, seed)]


def refuse_without_rows(job: Job, data: str, split: str, source: Source) -> None:
    """DataError where data has no row of a split because it has none at all: its name is no mistake."""
    known = source.splits()
    if not known or split in known:
        column = job.data[data].columns.split
        none = "it has no rows" if column is None else f"it has no rows, or none with a split in column {column!r}"
        raise DataError(str(refusal(job, f"data.{data}", f"{none}: expected some to train on and to measure")))


def _refuse_without_label(job: Job, entry: TrainEntry, source: Source) -> None:
    # of other sources the label is no column
    unlabelled = isinstance(source, RowGroupSource) and source.spec.columns.label is None
    if entry.family.objective == "classes" and unlabelled:
        learns = f"family {entry.family.name} learns classes: expected columns.label, the column that says each row's"
        raise refusal(job, f"data.{entry.spec.data}", learns)


def _refuse_labelled_positions(job: Job, entry: TrainEntry, source: Source) -> None:
    if entry.family.objective == "classes" and source.labels_positions:
        data = entry.spec.data
        label = job.data[data].columns.label
        problem = f"it learns the class of a row, and column {label!r} of data.{data} has one for each position"
        raise misfit(job, f"{entry.where}.family", entry.family.name, f"a family that does without them: {problem}")


def _recipe(job: Job, entry: TrainEntry, source: Source, chunks: tuple[str, ...], *, seed: int) -> Recipe:
    return Recipe(
        family=entry.family.name,
        family_version=entry.family.version,
        hyperparameters=entry.hyperparameters,
        training=entry.training,
        seed=seed_of(job, seed),
        shape=tuple(source.shape),
        outputs=source.classes,
        categories=tuple(source.categories),
        vocabulary=source.vocabulary,
        chunks=chunks,
        dtype=job.numerics.dtype,
        threads=job.numerics.threads,
        deterministic=job.numerics.deterministic,
    )


def _lineage(entry: TrainEntry, recipe: Recipe, seed: int) -> list[Model]:
    """The model at each of its checkpoints, the last one first, and, unless the job says no, its untrained twin."""
    spec, name = entry.spec, f"{entry.name}-{seed}"
    twin = recipe.model_id(0) if spec.control else None
    models = [
        Model(
            recipe.model_id(step),
            name if step == recipe.steps else f"{name}@{step}",
            spec.data,
            recipe,
            step,
            twin,
            None,
            entry.where,
        )
        for step in reversed(recipe.checkpoints[1:])
    ]
    if twin is None:
        return models
    return [*models, Model(twin, f"{name}-init", spec.data, recipe, 0, None, recipe.lineage, entry.where)]


def _try_to_build(job: Job, where: str, recipe: Recipe) -> None:
    try:
        with _named(job, where), torch.device("meta"):
            module = recipe.build()
    except CensusError:
        raise
    except (Exception, SystemExit) as error:  # sizes that torch cannot count, mistakes of the family
        raise refusal(job, where, f"it cannot be built: {_first_line(error)}") from error
    if not isinstance(module, nn.Module):
        problem = f"family {recipe.family} builds {type(module).__name__}: expected a torch.nn.Module"
        raise refusal(job, where, problem)
    needed = COPIES * sum(weight.nbytes for weight in module.parameters())
    if needed > (memory := machine_bytes()):
        taken = f"weights, gradients and the optimizer's memory of them would take {needed / 2**30:.0f} GiB"
        raise refusal(job, where, f"{taken}, this machine has {memory / 2**30:.0f}: choose a smaller model")
    _try_to_describe(job, where, recipe.kind, recipe.parameters, recipe.task)
    _try_to_run(job, where, recipe, module)


def _try_to_describe(job: Job, where: str, family: Family, parameters: Any, task: Task) -> None:
    """Refuse a family that does not answer what it is asked when rows are written, at the end."""
    try:
        given = family.inputs(parameters, task, UNNAMED)
        inspect.signature(family.appearances).bind(None, UNNAMED)
    except Exception as error:
        problem = f"family {family.name} cannot say what its inputs mean where nothing is named: {_first_line(error)}"
        raise refusal(job, where, problem) from error
    if not isinstance(given, Mapping) or not all(isinstance(space, InputSpace) for space in given.values()):
        problem = f"of its inputs family {family.name} says {given!r}: expected an InputSpace by the path of a weight"
        raise refusal(job, where, problem)


def _try_to_run(job: Job, where: str, recipe: Recipe, module: nn.Module) -> None:
    """Refuse a module that cannot take the data's rows, or gives anything but a score for each class or token."""
    task, dtype = recipe.task, getattr(torch, recipe.dtype)
    try:
        with torch.device("meta"), torch.no_grad():
            given = module.to(dtype).eval()(*recipe.kind.example(task, ROWS, dtype))
    except (Exception, SystemExit) as error:
        # a forward that asks for values, which tensors without any cannot tell
        if isinstance(error, NotImplementedError) or "meta" in str(error):
            return
        problem = f"it does not run on rows of shape {task.shape}: {_first_line(error)}"
        raise refusal(job, where, problem) from error
    expected = (ROWS, *task.shape, task.vocabulary) if recipe.kind.objective != "classes" else (ROWS, task.outputs)
    if (shape := tuple(getattr(given, "shape", ()))) != expected:
        problem = f"of {ROWS} rows it gives a {type(given).__name__} of shape {shape}: expected scores of {expected}"
        raise refusal(job, where, problem)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
