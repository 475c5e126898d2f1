"""Programs of torch.export, loaded without running anything in them.

Layer 2: takes bytes. `torch.export.load` as it is (2.13) unpickles entries that a file marks so, falls back to full
unpickling where the safe one fails, evaluates the file's expressions with sympy, and looks up any function of torch
that the file names as an operator. So everything in the archive is checked against what a plain program needs, and
full unpickling is switched off while it is loaded.
"""

from __future__ import annotations

import inspect
import io
import json
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from pipeline.errors import ModelError, is_machines_fault

_FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_ENTRIES = re.compile(
    r"[^/]+/(models/[^/]+\.json|data/weights/(weight_\d+|[^/]+_config\.json)|data/constants/(tensor_\d+|[^/]+_config\.json)"
    r"|data/sample_inputs/[^/]+\.pt|archive_format|archive_version|version|byteorder|\.data/\w+)"
)
_OPERATORS = re.compile(r"torch\.ops\.(aten|prims)\.(?!from_file\b)\w+\.\w+|_operator\.\w+|math\.\w+|torch\.sym_\w+")
# attribute access, indexing and strings other than a symbol's name would be code
_EXPRESSION = re.compile(r"(Symbol\('\w+'|[\w\s+\-*/%(),=<>]|\.\d)*")
_WORDS = re.compile(
    r"Symbol|Integer|Float|Rational|Add|Mul|Pow|Min|Max|Eq|Ne|Lt|Le|Gt|Ge|And|Or|Not|Where|Mod|PythonMod|FloorDiv|CleanDiv|CeilDiv"
    r"|ModularIndexing|CeilToInt|FloorToInt|TruncToInt|RoundToInt|IntTrueDiv|FloatTrueDiv|PowByNatural|ToFloat|Identity"
    r"|floor|ceiling|positive|nonnegative|integer|real|True|False|[suzf]\d+"
)


def load_program(name: str, content: bytes) -> nn.Module:
    """The program of a .pt2 file as a module, which takes its arguments in order or by name.

    ModelError if it is damaged, holds more, or was made for training.
    """
    _check(name, content)
    try:
        with _tensors_only():
            exported = torch.export.load(io.BytesIO(content))
            module: nn.Module = exported.module(check_guards=False)
    except Exception as error:  # the format has no error class of its own
        if is_machines_fault(error):
            raise
        raise ModelError(f"{name} cannot be loaded: {type(error).__name__}: {error}") from error
    _refuse_training(name, module)
    spec = exported.call_spec.in_spec
    positional, _ = pytree.tree_unflatten([None] * spec.num_leaves, spec)
    _take_by_name(module, len(positional))
    # a program has one mode for ever; its own eval() only says that
    vars(module).pop("eval", None)
    vars(module).pop("train", None)
    return module.eval()


def _take_by_name(module: nn.Module, positional: int) -> None:
    """Hand arguments on as the program was exported with them: the first ones in order, all others by name."""
    signature = inspect.signature(module.forward)

    def arranged(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = list(signature.bind(*args, **kwargs).arguments.items())
        return tuple(value for _, value in given[:positional]), dict(given[positional:])

    # in front of its own, which checks what it is given
    module.register_forward_pre_hook(arranged, prepend=True, with_kwargs=True)


@contextmanager
def _tensors_only() -> Iterator[None]:
    before = os.environ.get(_FORCED)
    os.environ[_FORCED] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_FORCED]
        else:
            os.environ[_FORCED] = before


def _check(name: str, content: bytes) -> None:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.namelist()
            described = {entry: json.loads(archive.read(entry)) for entry in entries if entry.endswith(".json")}
    except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError) as error:
        raise ModelError(f"{name} is damaged, or no program of torch.export: {error}") from error
    for entry in entries:
        if not _ENTRIES.fullmatch(entry):
            raise ModelError(f"{name} holds {entry}: only programs of tensors and operators are loaded")
    for entry, value in described.items():
        for key, one in _fields(value):
            if reason := _refusal(key, one):
                raise ModelError(f"{name}, {entry}: {reason}: only programs of tensors and operators are loaded")


def _refusal(key: str, value: Any) -> str | None:
    if key == "use_pickle" and value:
        return "a tensor is pickled"
    if key in ("target", "as_operator") and isinstance(value, str) and not _OPERATORS.fullmatch(value):
        return f"operator {value}"
    if key == "expr_str":
        words = re.findall(r"[^\W\d]\w*", str(value))
        if not _EXPRESSION.fullmatch(str(value)) or not all(_WORDS.fullmatch(word) for word in words):
            return f"expression {value}"
    return None


def _fields(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, one in value.items():
            yield key, one
            yield from _fields(one)
    elif isinstance(value, list):
        for one in value:
            yield from _fields(one)


def _refuse_training(name: str, module: nn.Module) -> None:
    """Dropout and BatchNorm have their mode baked in."""
    graph = module.graph
    assert isinstance(graph, torch.fx.Graph)
    flags = {torch.ops.aten.dropout.default: 2, torch.ops.aten.batch_norm.default: 5}
    for node in graph.nodes:
        place = flags.get(node.target)
        if place is not None and len(node.args) > place and node.args[place] is True:
            raise ModelError(
                f"{name} was exported in training mode ({node.name}): call eval() before torch.export.export"
            )
