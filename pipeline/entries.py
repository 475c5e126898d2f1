"""What the entries of a job's models ask for, with everything checked that needs no data.

Layer 3. An entry trains a family, one model for each point of its grid and seed, or loads models from files. Which
models these are, on which data, is in `entry_models.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pipeline.errors import JobError, Mistakes
from pipeline.fit.settings import Training
from pipeline.foreign.spec import LoadSpec
from pipeline.grid import Point, label, points
from pipeline.job import MAX_SEED, SEED_STEP, Job, misfit, refusal, unknown
from pipeline.job_sections import ModelSpec
from pipeline.misfits import dotted
from pipeline.models.base import Family
from pipeline.registry import families


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
        if seed_of(job, seed) > MAX_SEED:
            largest = MAX_SEED - seed_of(job, 0)
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


def seed_of(job: Job, seed: int) -> int:
    """The seed of a model, of the job's and its own."""
    return job.seed * SEED_STEP + seed


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
