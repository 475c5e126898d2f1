"""The job: what to measure, from a TOML file, refused unless every key is known and every value of its type.

Layer 1. Knows no family, statistic or source: names and parameters that the registry must check are passed on, with
`unknown` and `misfit` to refuse them in the same words. `resources` say how a job runs and are in no digest.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, Field, PrivateAttr, ValidationError

from pipeline.errors import JobError, nearest
from pipeline.job_sections import Columns, DataSpec, ModelSpec, Numerics, Resources, Section, SiteSelection
from pipeline.legible import without, without_errors
from pipeline.misfits import dotted, found, in_words, misfit_at, problems, section_of, shown
from pipeline.places import Places, find_places

# the seed of a model is that of the job times the step, plus its own; the column holds a signed integer of 64 bits
SEED_STEP = 1_000_003
MAX_SEED = 2**63 - 1
# how often what is wrong is left out until the rest is right
MOST_ROUNDS = 5


class Job(Section):
    """Everything that is asked for."""

    name: str = Field(min_length=1, description="for people; in the manifest")
    seed: int = Field(default=0, ge=0, le=MAX_SEED // SEED_STEP, description="everything random is drawn from it")
    numerics: Numerics = Numerics()
    data: dict[str, DataSpec] = Field(min_length=1, description="data sets by name")
    models: tuple[ModelSpec, ...] = Field(min_length=1, description="what to train and measure")
    statistics: dict[str, dict[str, Any]] = Field(default={}, description="parameters by name; none named: all")
    sites: SiteSelection = SiteSelection()
    resources: Resources = Resources()
    _places: Places = PrivateAttr(default=Places(""))

    @property
    def allotted(self) -> Resources:
        """What workers are given: the resources, with a CPU for each of a task's threads at least."""
        cpus = max(self.resources.cpus_per_worker, self.numerics.threads)
        return self.resources.model_copy(update={"cpus_per_worker": cpus})

    @property
    def place(self) -> str:
        """The job file as it was given."""
        return self._places.file or "job"


class Asked(NamedTuple):
    """What a job file asks for: the job, without what is wrong, or None if too little is left; a line for each mistake.

    lost  entries of models that are not what the file says: too little of them can be read
    """

    job: Job | None
    mistakes: tuple[str, ...]
    lost: frozenset[int]


def load_job(path: str | Path) -> Job:
    """Read and check a job file; JobError with one line for everything that is wrong in it."""
    asked = read_job(path)
    if asked.job is None or asked.mistakes:
        raise JobError("\n".join(asked.mistakes))
    return asked.job


def read_job(path: str | Path) -> Asked:
    """Read a job file as far as it can be; JobError where it is no TOML."""
    file = str(path)
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        raw = _tuples(tomllib.loads(text))
    except FileNotFoundError:
        raise JobError(f"{file}: there is no such job file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"{file}: cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise JobError(f"{file}: not valid TOML: {error}") from None
    except RecursionError:
        raise JobError(f"{file}: cannot be read: its values are nested too deeply") from None
    places = find_places(file, text)
    checked = _checked(raw, places)
    return checked._replace(job=checked.job and _placed(checked.job, places, str(Path(path).absolute().parent)))


def _checked(raw: Any, places: Places) -> Asked:
    mistakes: list[str] = []
    lost: frozenset[int] = frozenset()
    for _ in range(MOST_ROUNDS):
        try:
            Job.model_validate(raw)
        except ValidationError as error:
            # what was left out may be missed now, which is no mistake of its own
            mistakes = mistakes or problems(places, raw, error, _section_at)
            raw, more = without_errors(raw, found(error))
            lost |= more
            continue
        for parts, value, expected in _what_json_cannot_hold([], raw):
            mistakes.append(misfit_at(places, dotted(parts), value, expected))
            raw = without(raw, parts)
        return Asked(Job.model_validate(raw), tuple(mistakes), lost)
    return Asked(None, tuple(mistakes), lost)


def _placed(job: Job, places: Places, directory: str) -> Job:
    """The job with what its messages and relative paths start from."""
    job._places = places
    for model in job.models:
        model._directory = directory
    for name, spec in job.data.items():
        spec._directory = directory
        spec._place = places.at(f"data.{name}")
    return job


def read_spec(identity: dict[str, Any], *, directory: str) -> DataSpec:
    """A data set of `job_identity`, whose relative names begin in a directory."""
    given, default = _tuples(identity), _tuples(DataSpec().model_dump(mode="json"))
    # a source tells what was given from what was not
    spec = DataSpec.model_validate({key: value for key, value in given.items() if value != default[key]})
    spec._directory = directory
    return spec


def job_identity(job: Job) -> dict[str, Any]:
    """Everything of a job that can change a result, as JSON values: what its digest is made from."""
    return job.model_dump(mode="json", exclude={"resources": True, "data": {"__all__": {"made_by"}}})


def unknown(job: Job, key: str, name: str, known: Iterable[str]) -> JobError:
    """The error for a name that does not exist: the value of `key` ("data.mnist.source"), or itself a key.

    It is a key if `key` ends with it, or is a section of the file ("statistics") in which it stands.
    """
    section, _, last = key.rpartition(".")
    if not section:
        return unknown(job, f"{key}.{name}", name, known)
    said = f"{name}: unknown key" if last == name else f"{last} = {shown(name)}: unknown"
    return JobError(f"{job._places.at(key)}: [{section}] {said}; {nearest(name, known)}")


def refusal(job: Job, section: str, problem: str) -> JobError:
    """The error for a section ("models[0].load") that cannot be as a whole."""
    return JobError(f"{job._places.at(section)}: {section_of(section)}{problem}")


def place_of(job: Job, key: str) -> str:
    """File and line of a key of the job, or of what holds it."""
    return job._places.at(key)


def misfit(job: Job, key: str, value: Any, expected: str) -> JobError:
    """The error for a value at `key` that is not as `expected`."""
    return JobError(misfit_at(job._places, key, value, in_words(expected)))


def _section_at(parts: list[int | str]) -> type[BaseModel]:
    """What checks the section of the file at a key."""
    match parts:
        case ["numerics"]:
            return Numerics
        case ["data", _]:
            return DataSpec
        case ["data", _, "columns"]:
            return Columns
        case ["models", _]:
            return ModelSpec
        case ["sites"]:
            return SiteSelection
        case ["resources"]:
            return Resources
    return Job


def _tuples(value: Any) -> Any:
    """Arrays as tuples: what is frozen holds nothing that can be changed."""
    if isinstance(value, list):
        return tuple(_tuples(one) for one in value)
    if isinstance(value, dict):
        return {key: _tuples(one) for key, one in value.items()}
    return value


def _what_json_cannot_hold(parts: list[int | str], value: Any) -> Iterator[tuple[list[int | str], Any, str]]:
    """Where a value is that no JSON has, and what was expected there."""
    if isinstance(value, dict | tuple):
        for part, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _what_json_cannot_hold([*parts, part], one)
    elif isinstance(value, float) and not math.isfinite(value):
        yield parts, value, "a finite number"
    elif not isinstance(value, str | int | float):
        yield parts, value, "a number, a string or a truth value"
