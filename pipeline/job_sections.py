"""The sections of a job: every key that may stand in one, with its type, its default and what it means.

Layer 1. Sections are frozen, and refuse keys that they do not know.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    PrivateAttr,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pipeline.credentials import holds_credentials
from pipeline.selecting import refuse_patterns

# beyond what any machine has, and any plan holds
MOST_THREADS = 4096
MOST_SEEDS = 1_000_000


class Section(BaseModel):
    """What every section is: read strictly, and changed by nobody."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Numerics(Section):
    """What decides the bits of a result: part of every key."""

    batch_rows: int = Field(default=256, ge=1, description="rows of one forward pass when measuring")
    threads: int = Field(default=1, ge=1, le=MOST_THREADS, description="torch threads of one task")
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = Field(default="float32", description="of the forward")
    tf32: bool = Field(default=False, description="allow TensorFloat-32 on GPUs")
    deterministic: bool = Field(default=True, description="deterministic kernels")


class Columns(Section):
    """Which columns of a data set are what."""

    features: str | tuple[str, ...] = Field(default=(), description="one column of lists, or several of numbers")
    label: str | None = Field(
        default=None,
        description="column with the class: an integer, or one of `labels`; of series and tokens also lists, one for "
        "each position",
    )
    key: str | None = Field(
        default=None,
        description="column that names a row: integers ≥ 0 or strings, each there once; within a chunk that is checked",
    )
    split: str | None = Field(default=None, description="column with the split; without it all rows are split 'all'")
    shape: tuple[PositiveInt, ...] | None = Field(default=None, description="shape of a row's features, [8, 8] say")

    @field_validator("features")
    @classmethod
    def _are_named_once(cls, given: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for place, name in enumerate(() if isinstance(given, str) else given):
            if name in given[:place]:
                raise PydanticCustomError(
                    "misfit", "every column once, and {name} is there twice", {"name": repr(name)}
                )
        return given

    @model_validator(mode="after")
    def _does_not_show_the_label(self) -> Self:
        features = (self.features,) if isinstance(self.features, str) else self.features
        if self.label in features:
            raise ValueError(f"column {self.label!r} is the label and one of the features: leave it out of them")
        return self


def _refuse_credentials(key: str, value: Any) -> None:
    """ValueError for credentials in a URL, which would be stored beside the tables, or what no name has."""
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError(f"{key} holds the character 0, which no name has")
        if holds_credentials(value):
            raise ValueError(f"{key} must not hold credentials; put them in the environment (AWS_PROFILE …)")
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for name, part in parts:
        _refuse_credentials(f"{key}[{name}]" if isinstance(name, int) else f"{key}.{name}", part)


def _located(directory: str, name: str) -> str:
    return name if "://" in name else os.path.abspath(Path(directory, os.path.expanduser(name)))


def _named(directory: str, url: str, location: str) -> str:
    if "://" in location or Path(os.path.expanduser(url)).is_absolute():
        return location
    return Path(os.path.relpath(location, os.path.abspath(directory))).as_posix()


def _without_slash(split: str) -> str:
    # coverage is kept by "data/split"; a data set's name may hold slashes because the last one ends it
    if "/" in split:
        nearest_name = split.replace("/", "-")
        raise PydanticCustomError("split", f'a split without "/": rename it in the data as well, "{nearest_name}" say')
    return split


SplitName = Annotated[str, AfterValidator(_without_slash)]


class DataSpec(Section):
    """One data set: where it is and how its rows are read."""

    source: str = Field(default="parquet", description="kind of source")
    url: str | None = Field(
        default=None, min_length=1, description="file, directory or glob on any fsspec URL; relative to the job"
    )
    made_by: str | None = Field(default=None, description="command that makes it, to be named where it is missing")
    columns: Columns = Columns()
    classes: int | None = Field(default=None, ge=1, description="number of classes of an integer label")
    labels: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="classes of a string label, in order"
    )
    train: str = Field(default="train", description="split to train on")
    measure: tuple[SplitName, ...] = Field(default=("test",), min_length=1, description="splits to measure on")
    chunk_rows: int = Field(default=65_536, ge=1, description="rows of one unit of work, in whole row groups")
    max_unreadable: float = Field(default=0.0, ge=0, le=1, description="share of a chunk's rows that may be unreadable")
    options: dict[str, Any] = Field(default={}, description="what the source takes besides")
    _directory: str = PrivateAttr(default=".")
    _place: str = PrivateAttr(default="job")

    @model_validator(mode="before")
    @classmethod
    def _without_a_split_column(cls, given: Any) -> Any:
        named = given.get("columns") if isinstance(given, dict) else None
        split = named.get("split") if isinstance(named, dict) else named.split if isinstance(named, Columns) else ""
        if split is None:
            return {"train": "all", "measure": ("all",), **given}
        return given

    @model_validator(mode="after")
    def _holds_no_credentials(self) -> Self:
        _refuse_credentials("url", self.url)
        _refuse_credentials("options", self.options)
        return self

    @model_validator(mode="after")
    def _classes_agree(self) -> Self:
        if self.labels is not None and len(set(self.labels)) < len(self.labels):
            twice = next(one for at, one in enumerate(self.labels) if one in self.labels[:at])
            raise ValueError(f"labels names {twice!r} twice; expected each class once")
        if self.labels is not None and self.classes not in (None, len(self.labels)):
            raise ValueError(f"classes = {self.classes}, but labels names {len(self.labels)}; leave classes out")
        return self

    @model_validator(mode="after")
    def _splits_exist(self) -> Self:
        asked = {self.train, *self.measure}
        if self.columns.features and self.columns.split is None and asked != {"all"}:
            raise ValueError(f"splits {sorted(asked)} need columns.split, the column that says which row is in which")
        return self

    @property
    def place(self) -> str:
        """Where the data set stands in its job file."""
        return self._place

    @property
    def location(self) -> str:
        """The URL, with a relative path made absolute from where the job file is."""
        return self.located(self.url or "")

    def located(self, name: str) -> str:
        """Where a file is that is named as in the job: relative to the job file unless absolute or a URL."""
        return _located(self._directory, name)

    def named(self, location: str) -> str:
        """How the job would name a file: relative to the job file if `url` is, so that both can move together."""
        return _named(self._directory, self.url or "", location)


Values = Annotated[tuple[Any, ...], Field(min_length=1)]


_SEEDS = "one model for each; 8 stands for 0 … 7"


class ModelSpec(Section):
    """Models on one data set: of a family, one for each seed and, of a grid, combination of values; or loaded ones."""

    family: str | None = Field(default=None, description="how the models are built")
    load: dict[str, Any] | None = Field(default=None, description="instead of a family: url, …, of models to load")
    data: str = Field(description="name of the data set to train and measure on")
    name: str | None = Field(default=None, min_length=1, description="prefix of the models' names; default: the family")
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1, description=_SEEDS)
    hyperparameters: dict[str, Any] = Field(default={}, description="of the family")
    training: dict[str, Any] = Field(default={}, description="steps, learning_rate, …")
    grid: tuple[dict[str, Values], ...] = Field(
        default=(),
        description="lists of values of hyperparameters or training: all combinations; or several such tables",
    )
    control: bool = Field(default=True, description="measure each model's untrained twin as well")
    _directory: str = PrivateAttr(default=".")

    @field_validator("seeds", mode="before")
    @classmethod
    def _counted(cls, given: Any) -> Any:
        if (type(given) is int and given < 1) or given in ((), []):
            raise PydanticCustomError("misfit", f"how many from 1, or an array of seeds ({_SEEDS})")
        if type(given) is int and given > MOST_SEEDS:
            raise PydanticCustomError("misfit", f"at most {MOST_SEEDS}")
        return tuple(range(given)) if type(given) is int else given

    @field_validator("grid", mode="before")
    @classmethod
    def _several(cls, given: Any) -> Any:
        several = (given,) if isinstance(given, dict) else given
        for grid in several if isinstance(several, tuple | list) else ():
            for key, values in grid.items() if isinstance(grid, dict) else ():
                if not isinstance(values, tuple | list) or not values:
                    raise PydanticCustomError("misfit", f"an array of one or more values of {key}")
        return several

    @model_validator(mode="after")
    def _seeds_are_different(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError("seeds must be different and not negative")
        return self

    @model_validator(mode="after")
    def _trains_or_loads(self) -> Self:
        if self.load is None and self.family is None:
            trained = f"family = … ({type(self).model_fields['family'].description})"
            raise ValueError(f"family is missing: expected {trained}, or a table load with the url of models to load")
        if self.load is not None:
            besides = self.model_fields_set & {"family", "seeds", "hyperparameters", "training", "grid"}
            if besides:
                raise ValueError(f"{min(besides)} says how to train: expected it or load, not both")
            _refuse_credentials("load", self.load)
        return self

    def located(self, name: str) -> str:
        """Where a file is that is named as in the job: relative to the job file unless absolute or a URL."""
        return _located(self._directory, name)

    def named(self, location: str) -> str:
        """How the job would name a file: relative to the job file if `load.url` is."""
        return _named(self._directory, str((self.load or {}).get("url", "")), location)


class SiteSelection(Section):
    """Which sites are measured, and on which rows. Patterns are globs of a site's name, kind or gate; "kind:conv*",
    "gate:relu" and "name:block*" are of one of them."""

    include: tuple[str, ...] = Field(default=("*",), min_length=1, description="patterns of the sites to measure")
    exclude: tuple[str, ...] = Field(default=(), description="patterns of sites to leave out")
    rows: dict[str, float] = Field(
        default={}, description="fraction of the rows, drawn by their uid, by pattern; the smallest that matches counts"
    )

    @model_validator(mode="after")
    def _patterns_are_of_labels(self) -> Self:
        refuse_patterns(self.include, self.exclude, self.rows)
        return self


class Resources(Section):
    """How a job is run: nothing here changes a byte of the result.

    But for GPUs: their float sums differ in the last bits, and a run that asks for them has states of its own.
    """

    workers: int = Field(default=0, ge=0, description="processes; 0: as many as the CPUs allow")
    cpus_per_worker: int = Field(default=1, ge=1, description="at least numerics.threads are given")
    gpus_per_worker: float = Field(default=0.0, ge=0, description="0.25: four workers share a GPU and its memory")
    memory_gib: float | None = Field(
        default=None,
        gt=0,
        description="of a node's memory, what Ray counts for each worker, and what decides how many large models are "
        "measured together; no worker is held to it. None: Ray counts none, and a worker has its CPUs' share",
    )
    max_state_gib: float = Field(default=64.0, gt=0, description="refuse a plan whose states take more")
    retries: int = Field(default=3, ge=0, description="how often a task is repeated whose worker died")

    @field_validator("gpus_per_worker")
    @classmethod
    def _is_given_by_ray(cls, given: float) -> float:
        # what is finer, and parts of a second GPU, Ray does not book
        if not (given.is_integer() or (given < 1 and round(given, 4) == given)):
            raise PydanticCustomError("misfit", "a share of a GPU in steps of 0.0001, 0.25 say, or a number of GPUs")
        return given
