"""From a model's files to a module with its weights.

Layer 2: takes bytes. Packages that only some models need are imported where they are needed.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from types import FunctionType
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from pipeline.errors import ModelError, nearest
from pipeline.foreign.files import CONFIG
from pipeline.foreign.program import load_program
from pipeline.foreign.spec import LoadSpec
from pipeline.foreign.state import fit_state, read_state
from pipeline.models.base import Task
from pipeline.registry import families

# a builder runs code of its package: the operator, not the job, says which packages may be
PACKAGES = ("pipeline", "timm", "torch", "torchvision", "transformers")
MORE_PACKAGES = "NEURON_CENSUS_PACKAGES"


def load_module(spec: LoadSpec, contents: Mapping[str, bytes], task: Task) -> nn.Module:
    """The module in eval mode with its weights, from its files by name. ModelError that says what does not fit.

    `task` is what the data says a family is to be built for. Nothing in the files is run or unpickled.
    """
    if CONFIG in contents:
        return _from_transformers(spec, contents).eval()
    ((name, content),) = contents.items()
    match PurePosixPath(name).suffix:
        case ".pt2":
            return load_program(name, content)
        case ".onnx":
            return _from_onnx(name, content).eval()
    with torch.random.fork_rng(devices=[]):
        module = _architecture(spec, task)
    return fit_state(module, read_state(name, content, key=spec.key, prefix=spec.prefix), name).eval()


def more_packages() -> tuple[str, ...]:
    """Packages that the environment names besides PACKAGES, separated by commas."""
    return tuple(name.strip() for name in os.environ.get(MORE_PACKAGES, "").split(",") if name.strip())


def _architecture(spec: LoadSpec, task: Task) -> nn.Module:
    if spec.family is not None:
        return _from_family(spec.family, spec.arguments, task)
    if spec.builder is not None:
        return _built(spec.builder, _imported(spec.builder), spec.arguments)
    if spec.timm is not None:
        return _from_timm(spec.timm, spec.arguments)
    raise ModelError("a file of weights alone says nothing of its model: name load.family, load.builder or load.timm")


def _from_family(name: str, hyperparameters: Mapping[str, Any], task: Task) -> nn.Module:
    known = families()
    if name not in known:
        raise ModelError(f"load.family = {name!r} is unknown; {nearest(name, known)}")
    family = known[name]
    try:
        return family.build(family.parameters(**hyperparameters), task)  # type: ignore[no-any-return]
    except ValidationError as error:
        first = error.errors()[0]
        raise ModelError(f"load.arguments.{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def _imported(builder: str) -> Callable[..., Any]:
    path, name = builder.split(":")
    package = path.partition(".")[0]
    if package not in PACKAGES + more_packages():
        raise ModelError(
            f"load.builder = {builder!r}: package {package} is not allowed; {nearest(package, PACKAGES)}; "
            f"who runs the workers can add it to {MORE_PACKAGES}"
        )
    found: Any = getattr(_optional(path, extra=None), name, None)
    if not _may_build(found):
        raise ModelError(f"load.builder = {builder!r}: {path} has no subclass of torch.nn.Module of that name")
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
    except Exception as error:  # whatever a constructor does not like about its arguments
        raise ModelError(f"{name} cannot be built of {dict(arguments)}: {type(error).__name__}: {error}") from error
    if not isinstance(module, nn.Module):
        raise ModelError(f"{name} builds a {type(module).__name__}, expected a torch.nn.Module")
    return module


def _from_timm(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    timm = _optional("timm", extra="timm")
    if name not in (known := timm.list_models()):
        close = get_close_matches(name, known, n=8, cutoff=0.3)  # of a thousand
        raise ModelError(f"load.timm = {name!r} is unknown; {nearest(name, close)}")
    return _built(f"timm model {name}", lambda **given: timm.create_model(name, pretrained=False, **given), arguments)


def _from_onnx(name: str, content: bytes) -> nn.Module:
    onnx, converter = _optional("onnx", extra="onnx"), _optional("onnx2torch", extra="onnx")
    try:
        return converter.convert(onnx.load_from_string(content))  # type: ignore[no-any-return]
    except Exception as error:  # protobuf's and the converter's errors
        raise ModelError(f"{name} cannot be converted: {type(error).__name__}: {error}") from error


def _from_transformers(spec: LoadSpec, contents: Mapping[str, bytes]) -> nn.Module:
    transformers = _optional("transformers", extra="transformers")
    if not any(name.endswith(".safetensors") for name in contents):
        raise ModelError("a transformers directory without *.safetensors: convert its pickled weights first")
    if not hasattr(transformers, spec.auto):
        raise ModelError(f"load.auto = {spec.auto!r} is no class of transformers")
    with TemporaryDirectory() as directory:
        for name, content in contents.items():
            Path(directory, name).write_bytes(content)
        try:
            module, found = getattr(transformers, spec.auto).from_pretrained(
                directory,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                **spec.arguments,
            )
        except Exception as error:  # transformers raises many kinds
            raise ModelError(f"transformers cannot load the directory: {type(error).__name__}: {error}") from error
    # what a task's head has besides the model asked for is unexpected, and no harm; what is missing would be random
    missing = {what: sorted(map(str, found[what])) for what in ("missing_keys", "mismatched_keys") if found[what]}
    if missing:
        raise ModelError(f"the directory's weights do not fit {spec.auto}: {missing}")
    return module  # type: ignore[no-any-return]


def _optional(name: str, extra: str | None) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        install = f"; pip install 'neuron-census[{extra}]'" if extra else ""
        raise ModelError(f"{name} cannot be imported: {error}{install}") from error
