"""Every tensor that a model keeps, wherever it keeps it: registered or not, in lists and dictionaries or modules there.

Layer 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

_HOLDING = (torch.Tensor, nn.Module, Mapping, list, tuple)
# what torch itself keeps on a module
_OWN = frozenset(vars(nn.Module())) - {"_parameters", "_buffers"}


def held_tensors(model: nn.Module) -> dict[int, tuple[str, torch.Tensor]]:
    """Parameters, buffers and other tensors of a model by id, under the first path that names them."""
    held: dict[int, tuple[str, torch.Tensor]] = {}
    for path, module in model.named_modules():
        for name, tensor in (*_registered(module), *_plain(module)):
            held.setdefault(id(tensor), (f"{path}.{name}" if path else name, tensor))
    return held


def plain_tensors(model: nn.Module) -> dict[tuple[str, str], torch.Tensor]:
    """Tensors that modules hold without having registered them, by (module path, name)."""
    return {(path, name): tensor for path, module in model.named_modules() for name, tensor in _plain(module)}


def _registered(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for group in (module._parameters, module._buffers):
        yield from ((name, tensor) for name, tensor in group.items() if tensor is not None)


def _plain(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in vars(module).items():
        if name not in _OWN and name not in ("_parameters", "_buffers"):
            yield from _within(name, value, set())


def _within(path: str, value: Any, above: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, nn.Module):
        # one in a list or a dictionary is not registered
        yield from ((f"{path}.{name}", tensor) for name, tensor in held_tensors(value).values())
    elif isinstance(value, Mapping | list | tuple) and id(value) not in above:
        parts = value.items() if isinstance(value, Mapping) else enumerate(value)
        for name, part in parts:
            # a vocabulary may have very many entries
            if isinstance(part, _HOLDING):
                yield from _within(f"{path}.{name}", part, {*above, id(value)})
