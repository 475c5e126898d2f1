"""What weights belong to: the module of a family, of an importable class, of timm or of a transformers configuration.

Layer 2. Packages that only some models need are imported where they are needed. A package that is missing, or may not
be used, is a JobError: it says nothing about the model, and nothing may be recorded of it.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from types import FunctionType
from typing import Any

from pydantic import ValidationError
from torch import nn

from pipeline.errors import JobError, ModelError, closest, is_machines_fault, nearest
from pipeline.fit.objective import Objective
from pipeline.foreign.call import Call
from pipeline.foreign.spec import LoadSpec
from pipeline.hashing import digest
from pipeline.models.base import Task
from pipeline.registry import families

# a builder runs code of its package: the operator, not the job, says which packages may be
PACKAGES = ("pipeline", "timm", "torch", "torchvision", "transformers")
MORE_PACKAGES = "NEURON_CENSUS_PACKAGES"
# what a transformers model calls the tokens of a row and which of them are real, or an image
_TEXT, _IMAGE = ("input_ids", "attention_mask"), ("pixel_values",)


@dataclass(frozen=True, eq=False)
class Architecture:
    """Everything of a model but its numbers; two are equal if what they build is.

    config  content of a transformers directory's config.json; None of all others
    """

    spec: LoadSpec
    task: Task
    config: bytes | None = None

    @cached_property
    def id(self) -> str:
        """The same for models that are built alike."""
        config = None if self.config is None else self.config.decode(errors="replace")
        task = [self.task.shape, self.task.outputs, self.task.categories, self.task.vocabulary]
        return digest([self.spec.identity, self.family_version, task, config])

    @property
    def family_version(self) -> int | None:
        """That of its family."""
        family = families().get(self.spec.family or "")
        return family.version if family else None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Architecture) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    def build(self) -> nn.Module:
        """The module, its weights as the current random state gives them. ModelError where it cannot be."""
        spec = self.spec
        if self.config is not None:
            return _from_config(spec, self.config)
        if spec.family is not None:
            return _from_family(spec.family, spec.arguments, self.task)
        if spec.builder is not None:
            return _built(spec.builder, _imported(spec.builder), spec.arguments)
        if spec.timm is not None:
            return _from_timm(spec.timm, spec.arguments)
        raise ModelError(
            "a file of weights alone says nothing of its model: name load.family, load.builder or load.timm"
        )

    @property
    def call(self) -> Call:
        """How its modules are called."""
        names = self.spec.inputs
        if names is None and self.config is not None:
            names = {"tokens": _TEXT, "image": _IMAGE}.get(self.task.kind)
        return Call(names, self.task.outputs)

    @property
    def objective(self) -> Objective:
        """What its outputs are scored as, where no family and no rows say it."""
        return "next token" if self.config is not None and self.spec.auto.endswith("CausalLM") else "classes"

    @property
    def label(self) -> str | None:
        """What the table of models calls it; None where only the file knows."""
        spec = self.spec
        return spec.family or spec.builder or spec.timm or _model_type(self.config)


def more_packages() -> tuple[str, ...]:
    """Packages that the environment names besides PACKAGES, separated by commas."""
    return tuple(name.strip() for name in os.environ.get(MORE_PACKAGES, "").split(",") if name.strip())


def optional(name: str, extra: str | None) -> Any:
    """A package that is not always there; JobError that says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        where = "" if extra else f" on {socket.gethostname()}"
        cure = (
            f"pip install 'neuron-census[{extra}]'" if extra else "install it there, or name its folder in PYTHONPATH"
        )
        raise JobError(f"{name} cannot be imported{where}: {error}; {cure}") from error


def _from_family(name: str, hyperparameters: Mapping[str, Any], task: Task) -> nn.Module:
    known = families()
    if name not in known:
        raise ModelError(f"load.family = {name!r} is unknown; {nearest(name, known)}")
    family = known[name]
    try:
        return family.build(family.parameters(**hyperparameters), task)  # type: ignore[no-any-return]
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        said = nearest(key, family.parameters.model_fields) if first["type"] == "extra_forbidden" else first["msg"]
        raise ModelError(f"load.arguments.{key}: {said}") from error


def _imported(builder: str) -> Callable[..., Any]:
    path, name = builder.split(":")
    package = path.partition(".")[0]
    if package not in (known := PACKAGES + more_packages()):
        raise ModelError(
            f"load.builder = {builder!r}: package {package} is not allowed; {nearest(package, known)}; "
            f"who runs the workers can add it to {MORE_PACKAGES}"
        )
    module = optional(path, extra=None)
    found: Any = getattr(module, name, None)
    if not _may_build(found):
        meant = closest(name, [one for one, value in vars(module).items() if _may_build(value)])
        said = f"{path} has no subclass of torch.nn.Module of that name; {meant}".rstrip("; ")
        raise ModelError(f"load.builder = {builder!r}: {said}")
    return found  # type: ignore[no-any-return]


def _may_build(found: Any) -> bool:
    """A module's class; a function only where nothing but models is made: torch has some that run code."""
    if isinstance(found, type):
        return issubclass(found, nn.Module)
    where = found.__module__ if isinstance(found, FunctionType) else ""
    return where.startswith("torchvision.models.") or where.partition(".")[0] in more_packages()


def _built(name: str, builder: Callable[..., Any], arguments: Mapping[str, Any]) -> nn.Module:
    try:
        module = builder(**arguments)
    except (Exception, SystemExit) as error:  # whatever a constructor does not like about its arguments
        raise ModelError(f"{name} cannot be built of {dict(arguments)}: {type(error).__name__}: {error}") from error
    if not isinstance(module, nn.Module):
        raise ModelError(f"{name} builds a {type(module).__name__}, expected a torch.nn.Module")
    return module


def _from_timm(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    timm = optional("timm", extra="timm")
    if name not in (known := timm.list_models()):
        close = get_close_matches(name, known, n=8, cutoff=0.3)  # of a thousand
        raise ModelError(f"load.timm = {name!r} is unknown; {nearest(name, close)}")
    return _built(f"timm model {name}", lambda **given: timm.create_model(name, pretrained=False, **given), arguments)


def auto_class(spec: LoadSpec) -> Any:
    """The class of transformers that makes a directory's model; ModelError if there is none of that name."""
    transformers = optional("transformers", extra="transformers")
    if not hasattr(transformers, spec.auto):
        raise ModelError(f"load.auto = {spec.auto!r} is no class of transformers")
    return getattr(transformers, spec.auto)


def _model_type(config: bytes | None) -> str | None:
    try:
        found = json.loads(config or b"{}").get("model_type")
    except (ValueError, AttributeError):
        return None
    return found if isinstance(found, str) else None


def _from_config(spec: LoadSpec, content: bytes) -> nn.Module:
    maker, known = auto_class(spec), optional("transformers", extra="transformers").CONFIG_MAPPING
    try:
        config = json.loads(content)
        made = known[config["model_type"]].from_dict(config)
        return maker.from_config(made, trust_remote_code=False, **spec.arguments)  # type: ignore[no-any-return]
    except Exception as error:  # transformers raises many kinds
        if is_machines_fault(error):
            raise
        raise ModelError(f"config.json describes no {spec.auto}: {type(error).__name__}: {error}") from error
