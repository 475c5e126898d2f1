"""What the entries of a job's models stand for: every model by its id, name and origin, checked before anything runs.

Layer 3. An entry trains a family, one model for each point of its grid and seed, or loads models from files; each is
followed by its untrained twin.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pipeline.devices import machine_bytes
from pipeline.errors import DataError, JobError, Mistakes, ModelError, nearest
from pipeline.fit.recipe import Recipe
from pipeline.fit.settings import Training
from pipeline.foreign.entry import Place, loaded_models, twins
from pipeline.foreign.origin import Untrained
from pipeline.foreign.spec import LoadSpec
from pipeline.grid import Point, label, points
from pipeline.job import MAX_SEED, SEED_STEP, Job, ModelSpec, misfit, refusal, unknown
from pipeline.misfits import dotted
from pipeline.models.base import Family, Task
from pipeline.origins import Origin
from pipeline.registry import families
from pipeline.sources.base import Source
from pipeline.store import Store

# of each weight while it is trained: itself, its gradient, and at least one number of the optimizer
COPIES = 3


@dataclass(frozen=True)
class Model:
    """One model of a run.

    step        of its training; None where that is not known
    control     id of its untrained twin
    control_of  the lineage (of several that begin alike, the first) or architecture whose twin it is
    """

    id: str
    name: str
    data: str
    origin: Origin
    step: int | None
    control: str | None
    control_of: str | None

    @property
    def start(self) -> str | None:
        """Id of the model that it was before training; the twin of a loaded one began with other weights."""
        return self.control if isinstance(self.origin, Recipe) else None


@dataclass(frozen=True)
class TrainEntry:
    """One entry of a job's models, or one point of its grid, with everything that needs no data checked."""

    where: str
    spec: ModelSpec
    family: Family
    name: str
    hyperparameters: dict[str, Any]
    training: dict[str, Any]


@dataclass(frozen=True)
class LoadEntry:
    """One entry whose models are loaded."""

    where: str
    spec: ModelSpec
    load: LoadSpec


def entries_of(job: Job, index: int) -> list[TrainEntry] | list[LoadEntry]:
    """What one entry asks for: a training for each point of its grid, or files to load. JobError if it is wrong."""
    spec, where = job.models[index], f"models[{index}]"
    mistakes = Mistakes()
    entries: list[Any] = []
    with mistakes.noted():
        if spec.data not in job.data:
            raise unknown(job, f"{where}.data", spec.data, job.data)
    with mistakes.noted():
        entries += _loads(job, where, spec, spec.load) if spec.load is not None else _trainings(job, where, spec)
    mistakes.refuse()
    return entries


def _loads(job: Job, where: str, spec: ModelSpec, load: Mapping[str, Any]) -> list[LoadEntry]:
    return [LoadEntry(where, spec, _load_spec(job, where, load))]


def _trainings(job: Job, where: str, spec: ModelSpec) -> list[TrainEntry]:
    if spec.family not in families():
        raise unknown(job, f"{where}.family", spec.family or "", families())
    mistakes = Mistakes()
    entries: list[TrainEntry] = []
    with mistakes.noted():
        _refuse_large_seeds(job, where, spec)
    with mistakes.noted():
        _refuse_what_no_grid_can_set(job, where, spec)
        for point in points(spec.grid):
            with mistakes.noted():
                entries.append(_entry(job, where, spec, point))
    mistakes.refuse()
    return entries


def _entry(job: Job, where: str, spec: ModelSpec, point: Point) -> TrainEntry:
    family: Family = families()[spec.family or ""]
    read = partial(_validated, job, where, point=point)
    mistakes = Mistakes()
    hyperparameters, training = {}, {}
    with mistakes.noted():
        hyperparameters = read("hyperparameters", family.parameters, spec.hyperparameters)
    with mistakes.noted():
        training = read("training", Training, spec.training)
    mistakes.refuse()
    name = "-".join(part for part in (spec.name or spec.family, label(point)) if part)
    return TrainEntry(where, spec, family, name, hyperparameters, training)


def _refuse_what_no_grid_can_set(job: Job, where: str, spec: ModelSpec) -> None:
    tables = {"hyperparameters": families()[spec.family or ""].parameters, "training": Training}
    known = [name for table in tables.values() for name in table.model_fields]
    for key in (key for grid in spec.grid for key in grid):
        if key not in known:
            raise unknown(job, f"{where}.grid.{key}", key, known)
        for table in tables:
            if key in (given := getattr(spec, table)):
                raise misfit(job, f"{where}.{table}.{key}", given[key], "no value here, as the grid has some")


def _refuse_large_seeds(job: Job, where: str, spec: ModelSpec) -> None:
    for index, seed in enumerate(spec.seeds):
        if _seed(job, seed) > MAX_SEED:
            largest = MAX_SEED - _seed(job, 0)
            raise misfit(job, f"{where}.seeds[{index}]", seed, f"{largest} or less, as the job's seed is {job.seed}")


def _load_spec(job: Job, where: str, given: Mapping[str, Any]) -> LoadSpec:
    spec = _checked(job, f"{where}.load", LoadSpec, given)
    if spec.family is None:
        return spec
    if spec.family not in families():
        raise unknown(job, f"{where}.load.family", spec.family, families())
    arguments = _checked(job, f"{where}.load.arguments", families()[spec.family].parameters, spec.arguments)
    # defaults are part of how a model is built
    return spec.model_copy(update={"arguments": arguments.model_dump(mode="json")})


def models_of(job: Job, entry: TrainEntry | LoadEntry, source: Source, store: Store) -> list[Model]:
    """The models of an entry, each training's followed by its untrained twin. JobError where they cannot be."""
    if isinstance(entry, TrainEntry):
        return _trained(job, entry, source)
    return _loaded(job, entry, source, store)


def _loaded(job: Job, entry: LoadEntry, source: Source, store: Store) -> list[Model]:
    """The models that an entry's files are, and behind them the untrained twin of each architecture."""
    where, spec, load = entry.where, entry.spec, entry.load
    if load.family is not None:
        _refuse_unfit_data(job, where, spec.data, families()[load.family], source)
    task = Task(tuple(source.shape), source.classes, tuple(source.categories), source.vocabulary)
    place = Place(spec.located(load.url), spec.named)
    chunks = source.chunks(job.data[spec.data].train) or source.chunks(job.data[spec.data].measure[0])
    with _named(job, f"{where}.load"):
        found, pin = loaded_models(load, place, task, dtype=job.numerics.dtype, store=store)
    if load.sha256 not in (None, pin):
        raise misfit(job, f"{where}.load.sha256", load.sha256, f"the sha256 of what is there, {pin}")
    with _named(job, f"{where}.load"):
        made = twins(found, seed=_seed(job, 0), data=spec.data, chunks=chunks, numerics=job.numerics)
    controls = made if spec.control else {}
    models = []
    for name, origin in found.items():
        twin = controls.get(origin.architecture)
        named = name if spec.name is None else f"{spec.name}-{name}"
        models.append(Model(origin.id, named, spec.data, origin, None, twin.id if twin else None, None))
    for architecture, twin in controls.items():
        base = spec.name or (architecture.label or "").rpartition(":")[2]
        several = "" if len(controls) == 1 else f"-{twin.id[:8]}"
        models.append(Model(twin.id, f"{base}{several}-init", spec.data, twin, 0, None, architecture.id))
    return models


@contextmanager
def _named(job: Job, where: str) -> Iterator[None]:
    """Say which entry asks for what cannot be."""
    try:
        yield
    except (JobError, ModelError) as error:
        raise refusal(job, where, str(error)) from error
    except DataError as error:
        raise DataError(str(refusal(job, where, str(error)))) from error


def _refuse_unfit_data(job: Job, where: str, data: str, family: Family, source: Source) -> None:
    if family.whole != source.whole:
        takes = "a graph" if family.whole else "single rows"
        raise misfit(job, f"{where}.data", data, f"data of {takes}, which family {family.name} takes")
    if family.objective == "classes" and not source.classes:
        tells = f"data with classes, which family {family.name} tells apart"
        raise misfit(job, f"{where}.data", data, f"{tells}: classes = … (or labels), and columns.label to learn them")


def once(models: Iterable[Model]) -> tuple[Model, ...]:
    """The models without repeated twins: entries of one architecture share theirs, trainings that begin alike too.

    A grid of ten learning rates has one twin for each seed; which of the ten it belongs to changes none of its weights.
    """
    found: dict[Hashable, Model] = {}
    twin_of: dict[str, str] = {}
    for number, model in enumerate(models):
        first = found.setdefault(_twin(model) or number, model)
        twin_of[model.id] = first.id
    return tuple(
        replace(model, control=twin_of.get(model.control, model.control)) if model.control else model
        for model in found.values()
    )


def _twin(model: Model) -> Hashable:
    """What an untrained twin is told from others by; None for any other model."""
    match model.origin:
        case Untrained():
            return model.id
        case Recipe(beginning=beginning) if model.control_of is not None:
            return model.data, beginning
    return None


def _trained(job: Job, entry: TrainEntry, source: Source) -> list[Model]:
    """The trained models of an entry, one for each seed, each followed by its untrained twin."""
    data = entry.spec.data
    _refuse_unfit_data(job, entry.where, data, entry.family, source)
    if entry.family.objective == "classes" and source.labels_positions:
        label = job.data[data].columns.label
        problem = f"it learns the class of a row, and column {label!r} of data.{data} has one for each position"
        raise misfit(job, f"{entry.where}.family", entry.family.name, f"a family that does without them: {problem}")
    train = job.data[data].train
    chunks = source.chunks(train)
    if not chunks:
        raise misfit(
            job, f"data.{data}.train", train, f"a split with rows to train on; {nearest(train, source.splits())}"
        )
    # one tuple for all: a task of eight models carries it once
    trained_on = tuple(chunk.id for chunk in chunks)
    recipes = [
        Recipe(
            family=entry.family.name,
            family_version=entry.family.version,
            hyperparameters=entry.hyperparameters,
            training=entry.training,
            seed=_seed(job, seed),
            shape=tuple(source.shape),
            outputs=source.classes,
            categories=tuple(source.categories),
            vocabulary=source.vocabulary,
            chunks=trained_on,
            dtype=job.numerics.dtype,
            threads=job.numerics.threads,
            deterministic=job.numerics.deterministic,
        )
        for seed in entry.spec.seeds
    ]
    _try_to_build(job, entry.where, recipes[0])
    named = zip(recipes, entry.spec.seeds, strict=True)
    return [model for recipe, seed in named for model in _lineage(entry, recipe, seed)]


def _seed(job: Job, seed: int) -> int:
    return job.seed * SEED_STEP + seed


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
        )
        for step in reversed(recipe.checkpoints[1:])
    ]
    if twin is None:
        return models
    return [*models, Model(twin, f"{name}-init", spec.data, recipe, 0, None, recipe.lineage)]


def _try_to_build(job: Job, where: str, recipe: Recipe) -> None:
    try:
        with _named(job, where), torch.device("meta"):
            module = recipe.build()
    except (RuntimeError, TypeError) as error:  # sizes that torch cannot count
        raise refusal(job, where, f"it cannot be built: {str(error).splitlines()[0]}") from error
    needed = COPIES * sum(weight.nbytes for weight in module.parameters())
    if needed > (memory := machine_bytes()):
        taken = f"weights, gradients and the optimizer's memory of them would take {needed / 2**30:.0f} GiB"
        raise refusal(job, where, f"{taken}, this machine has {memory / 2**30:.0f}: choose a smaller model")


def _validated(
    job: Job, where: str, table: str, model: type[BaseModel], given: Mapping[str, Any], *, point: Point
) -> dict[str, Any]:
    """A table of an entry with what a point of the grid sets of it, checked."""
    chosen = {name: value for name, value in point.items() if name in model.model_fields}
    places = dict.fromkeys(chosen, f"{where}.grid")
    return _checked(job, f"{where}.{table}", model, {**given, **chosen}, places=places).model_dump(mode="json")


T = TypeVar("T", bound=BaseModel)


def _checked(
    job: Job, where: str, model: type[T], given: Mapping[str, Any], *, places: Mapping[str, str] = MappingProxyType({})
) -> T:
    """What a table says, read; `places` are those of keys that stand in another table. JobError with its mistakes."""
    try:
        return model(**given)
    except ValidationError as error:
        # of a value that fits no branch of a union the first says enough
        first = {one["loc"][0]: one for one in reversed(error.errors())}
        said = [str(_mistake(job, where, model, one, places)) for one in reversed(first.values())]
        raise JobError("\n".join(said)) from None


def _mistake(job: Job, where: str, model: type[BaseModel], found: ErrorDetails, places: Mapping[str, str]) -> JobError:
    key = dotted(found["loc"])
    path = f"{places.get(str(found['loc'][0]), where)}.{key}"
    if found["type"] == "extra_forbidden":
        return unknown(job, path, key, model.model_fields)
    if found["type"] == "missing":
        meaning = model.model_fields[key].description
        return refusal(job, where, f"{key} is missing: expected {key} = … ({meaning})")
    return misfit(job, path, found["input"], found["msg"])


def refuse_duplicates(job: Job, models: tuple[Model, ...]) -> None:
    """JobError where two models have the same id or name."""
    for what in ("id", "name"):
        seen: dict[str, Model] = {}
        for model in models:
            other = seen.setdefault(getattr(model, what), model)
            if other is not model:
                raise JobError(
                    f"{job.place}: models {other.name!r} and {model.name!r} have the same {what}: "
                    f"{_CURES[what, isinstance(model.origin, Recipe)]}"
                )


_CURES = {
    ("id", True): "give their entries different names, seeds or settings",
    ("id", False): "they are the same weights; measure those on other data in a job of its own",
    ("name", True): "give their entries different names, seeds or settings",
    ("name", False): "give their entries different names",
}
