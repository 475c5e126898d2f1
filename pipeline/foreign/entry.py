"""The models of one `load` table: those that are there, by name, and the untrained twins of what they are built as.

Layer 2: reads every file's bytes once, to name it, and nothing in them but configurations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from pipeline.errors import DataError, ModelError
from pipeline.fit.rows import spread
from pipeline.foreign.architecture import Architecture, auto_class, optional
from pipeline.foreign.digests import known_digests
from pipeline.foreign.files import CONFIG, ModelFiles, find_models, pin_of, read_model
from pipeline.foreign.origin import Loaded, Untrained
from pipeline.foreign.spec import LoadSpec
from pipeline.foreign.untrained import untrained
from pipeline.job_sections import Numerics
from pipeline.models.base import Task
from pipeline.models.norms import running_norms
from pipeline.sources.base import Chunk
from pipeline.store import Store


@dataclass(frozen=True)
class Place:
    """Where an entry's files are: `location` is the URL made absolute, `named` says what the job would call a file."""

    location: str
    named: Callable[[str], str]


class Found(NamedTuple):
    """Models by name, and what `sha256` would have to be to pin them."""

    models: dict[str, Loaded]
    pin: str


def loaded_models(spec: LoadSpec, place: Place, task: Task, *, dtype: str, store: Store) -> Found:
    """Every model of the entry by its name; files of the same content are one model, named by the first.

    DataError where there is none; JobError where a package is missing that they need.
    """
    models = find_models(place.location)
    digests = known_digests(models, place.location, store)
    _require_packages(spec, models)
    architectures: dict[str | None, Architecture] = {}
    found: dict[str, tuple[str, Loaded]] = {}
    for model, hashed in zip(models, digests, strict=True):
        if hashed.get(CONFIG) not in architectures:
            architectures[hashed.get(CONFIG)] = Architecture(spec, task, _config(model, hashed))
        named = (_as_named(place, model),)
        loaded = Loaded(architectures[hashed.get(CONFIG)], model, hashed, named, dtype)
        name, first = found.setdefault(loaded.id, (model.name, loaded))
        if first is not loaded:
            found[loaded.id] = name, replace(first, named=first.named + named)
    return Found(dict(found.values()), pin_of(models, digests))


def twins(
    models: Mapping[str, Loaded], *, seed: int, data: str, chunks: Sequence[Chunk], numerics: Numerics
) -> dict[Architecture, Untrained]:
    """The untrained twin of each architecture whose constructor draws all of its weights.

    `chunks` are those of the data that a twin with BatchNorm sees, `numerics` how it sees them. ModelError where an
    architecture that the job itself describes cannot be built; where a directory does, that is its model's own failure,
    later.
    """
    found = {}
    for architecture in dict.fromkeys(one.architecture for one in models.values() if not one.files.is_program):
        try:
            module = untrained(architecture.build, seed)
        except ModelError:
            if architecture.config is None:
                raise
            continue
        if module is not None:
            order, enough, _ = spread(chunks)
            shown = tuple(order[:enough]) if running_norms(module) else ()
            found[architecture] = Untrained(architecture, seed, data, shown, numerics)
    return found


def _as_named(place: Place, model: ModelFiles) -> str:
    """The file, or the directory, as the job would name it."""
    named = place.named(model.files[0][1].url)
    return named.rpartition("/")[0] if model.config else named


def _require_packages(spec: LoadSpec, models: Sequence[ModelFiles]) -> None:
    if any(model.config for model in models):
        auto_class(spec)
    if any(name.endswith(".onnx") for model in models for name, _ in model.files):
        optional("onnx", extra="onnx")
        optional("onnx2pytorch", extra="onnx")


def _config(model: ModelFiles, digests: Mapping[str, str]) -> bytes | None:
    if model.config is None:
        return None
    content = read_model(replace(model, files=((CONFIG, model.config),)), digests)[CONFIG]
    try:
        content.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{model.config.url}: no text: {error}") from error
    return content
