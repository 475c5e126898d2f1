"""Weights by name: read without unpickling anything but tensors, and fitted to a module in full.

Layer 2: pure; takes bytes.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import safetensors.torch
import torch
from torch import nn

from pipeline.counted import counted
from pipeline.errors import ModelError, is_machines_fault, nearest

State = dict[str, torch.Tensor]

# names listed in a message, of possibly thousands
LISTED = 8


def read_state(name: str, content: bytes, *, key: str | None = None, prefix: str = "") -> State:
    """The weights in a .safetensors or PyTorch file. ModelError if it is damaged or holds anything else.

    `key` is the entry that holds them ("state_dict", "model.ema"); `prefix` is removed from the names that have it.
    """
    if _is_script(content):
        raise ModelError(
            f"{name} is a TorchScript program, and loading one runs code from the file: save the state_dict of its "
            "module, or export the module with torch.export as .pt2"
        )
    if not content:
        raise ModelError(f"{name} cannot be read: it has 0 bytes")
    try:
        if PurePosixPath(name).suffix == ".safetensors":
            found: Any = safetensors.torch.load(content)
        else:
            found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # its own message advises to unpickle
        raise ModelError(
            f"{name} cannot be read: it is damaged, or holds more than tensors, which would have to be unpickled: save "
            "model.state_dict(), or safetensors"
        ) from error
    except Exception as error:  # damaged archives, refused pickles and bad headers have no common class
        if is_machines_fault(error):
            raise
        said = f"it is damaged, or cut off at its {counted(len(content), 'byte')}: {_first_line(error)}"
        raise ModelError(f"{name} cannot be read: {said}") from error
    found = _entry(name, found, key)
    if not isinstance(found, Mapping) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        kinds = {one: type(value).__name__ for one, value in found.items()} if isinstance(found, Mapping) else {}
        entries = _listed(f"{one} ({kind})" for one, kind in kinds.items() if kind != "Tensor")
        holds = f"holds {entries}" if kinds else f"holds a {type(found).__name__}"
        raise ModelError(f"{name} {holds}; expected tensors by name: set load.key to the entry that has them")
    unusual = [one for one, value in found.items() if value.layout != torch.strided or value.is_quantized]
    if unusual:
        raise ModelError(f"{name} holds sparse or quantised tensors, which cannot be kept: {_listed(unusual)}")
    named = {one.removeprefix(prefix): value for one, value in found.items()}
    if len(named) < len(found):
        twice = [one for one in named if prefix + one in found and one in found]
        raise ModelError(f"{name} has weights with the prefix {prefix!r} and without it: {_listed(twice)}")
    return named


def _is_script(content: bytes) -> bool:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return any(entry.endswith("/constants.pkl") or "/code/" in entry for entry in archive.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return False


def _entry(name: str, found: Any, key: str | None) -> Any:
    for part in key.split(".") if key else ():
        if not isinstance(found, Mapping) or part not in found:
            known = [str(one) for one in found] if isinstance(found, Mapping) else []
            raise ModelError(f"{name} has no entry {part!r} (load.key = {key!r}); {nearest(part, known[:20])}")
        found = found[part]
    return found


def check_state(forms: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], name: str) -> None:
    """ModelError that lists what is missing, left over, or of another shape or kind of numbers than a model's."""
    both = [one for one in forms if one in state]
    problems = {
        "missing": [one for one in forms if one not in state],
        # safetensors gives names in no fixed order
        "unexpected": sorted(one for one in state if one not in forms),
        "of another shape": [
            f"{one} is {tuple(state[one].shape)}, expected {tuple(forms[one].shape)}"
            for one in both
            if state[one].shape != forms[one].shape
        ],
        # whole numbers of a quantised weight mean nothing without what they are multiples of
        "of another kind": [
            f"{one} is {state[one].dtype}, expected {forms[one].dtype}"
            for one in both
            if forms[one].is_floating_point() and not state[one].is_floating_point()
        ],
    }
    if any(problems.values()):
        raise ModelError(f"{name} does not fit the model: {in_words(problems)}")


def in_words(problems: Mapping[str, Sequence[str]]) -> str:
    """How many weights there are of each problem, and which."""
    return "; ".join(f"{len(found)} {what}: {_listed(found)}" for what, found in problems.items() if found)


def superfluous(module: nn.Module, names: Iterable[str], *, base: str) -> list[str]:
    """Of weights that a module has no place for, those of parts that it has: a layer's bias, one more layer of a list.

    The others are parts that it lacks as a whole, such as the head of another task. Names may begin with "`base`.".
    """
    parts = dict(module.named_modules())
    return [one for one in names if _belongs(one, parts) or _belongs(one.removeprefix(f"{base}."), parts)]


def _belongs(name: str, parts: Mapping[str, nn.Module]) -> bool:
    owner = name.rpartition(".")[0]
    if owner in parts:
        return owner != ""
    while owner not in parts:
        owner = owner.rpartition(".")[0]
    return owner != "" and isinstance(parts[owner], nn.ModuleList | nn.Sequential | nn.ModuleDict)


def forms_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Each of a module's weights by name, without its numbers."""
    return {name: value.to("meta") for name, value in module.state_dict().items()}


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" … and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
