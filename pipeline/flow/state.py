"""What a forward leaves behind, on the model and in generators: refused where it is a buffer, else put back.

Layer 1.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.errors import ModelError
from pipeline.flow.holdings import held_tensors, plain_tensors

# words of eight bytes that are summed at a time: few launches, and on a CPU what its caches hold
_PIECE = {False: 1 << 18, True: 1 << 14}


class Kept:
    """What models keep on themselves beside parameters and buffers, as it is now; the mode that they are in too."""

    def __init__(self, *models: nn.Module) -> None:
        modules = [named for model in models for named in model.named_modules()]
        self._modules = [(path, module, dict(vars(module)), _contents(module)) for path, module in modules]
        held = [named for model in models for named in plain_tensors(model).items()]
        self._tensors = [(".".join(filter(None, place)), one, one.detach().clone()) for place, one in held]

    def changed(self) -> str | None:
        """The path of the first that is another object, or holds others; None where all is as it was."""
        for path, module, attributes, contents in self._modules:
            now, inner = vars(module), {name: (held, content) for name, held, content in contents}
            for name in (*now, *(attributes.keys() - now.keys())):
                is_same = name in now and name in attributes and now[name] is attributes[name]
                if not is_same or (name in inner and _parts(inner[name][0]) != _parts(inner[name][1])):
                    return f"{path}.{name}" if path else name
        return next((path for path, tensor, before in self._tensors if not _equal(before, tensor)), None)

    def put_back(self) -> None:
        """Let the models have it again."""
        for _, module, attributes, contents in self._modules:
            vars(module).update(attributes)
            for added in vars(module).keys() - attributes.keys():
                del vars(module)[added]
            for _, held, content in contents:
                _refill(held, content)
        for _, tensor, before in self._tensors:
            if not _equal(before, tensor):
                with torch.inference_mode(tensor.is_inference()):
                    tensor.detach().copy_(before)


@contextmanager
def kept(*models: nn.Module) -> Iterator[Kept]:
    """Put back what models keep on themselves beside parameters and buffers, and the mode that they are in."""
    before = Kept(*models)
    try:
        yield before
    finally:
        before.put_back()


@contextmanager
def unchanged(model: nn.Module) -> Iterator[Kept]:
    """Refuse a model that changes its buffers in eval mode; put back what else it keeps on itself, and draws from."""
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    with kept(model) as before, undrawn():
        yield before
    for name, buffer in model.named_buffers():
        if name not in buffers or not _equal(buffers[name], buffer):
            raise ModelError(
                f"buffer {name} changes in a forward pass in eval mode: a measurement would depend on the order of "
                "batches; make the update conditional on self.training"
            )


@contextmanager
def undrawn() -> Iterator[None]:
    """Let whoever draws random numbers next draw what was drawn in here."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)


def draw() -> None:
    """Draw a number from whatever random numbers come from: those that are drawn next are others."""
    random.random(), np.random.random(), torch.rand(())
    if torch.cuda.is_initialized():
        torch.rand((), device="cuda")


class Versions:
    """Which tensors a model has as parameters, how often each was written to, and a sum of what they and buffers hold,
    and of other tensors those `used`.

    What is written through `.data` is not counted by torch. A buffer that is exchanged for one of another shape is no
    change: a table of positions grows with the longest row.
    """

    def __init__(self, model: nn.Module, used: Collection[str] = ()) -> None:
        self._parameters: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
        self._buffers = dict(model.named_buffers(remove_duplicate=False))
        self._written = {name: None if one.is_inference() else one._version for name, one in self._parameters.items()}
        plain = {name: one for name, one in held_tensors(model).values() if name in used}
        self._others = {name: one for name, one in plain.items() if name not in self._parameters}
        self._sums = _sums({**self._others, **self._parameters, **self._buffers})

    def changed(self, before: Versions) -> str | None:
        """What is no longer as it was, as a message calls it."""
        for name, one in self._parameters.items():
            same = before._parameters.get(name) is one and before._written[name] == self._written[name]
            if not same or before._sums.get(name) != self._sums.get(name):
                return f"parameter {name}"
        for name, one in (*self._buffers.items(), *self._others.items()):
            held = before._buffers.get(name, before._others.get(name))
            if held is not None and held.shape == one.shape and before._sums.get(name) != self._sums.get(name):
                return f"buffer {name}" if name in self._buffers else f"tensor {name}"
        return None


def _sums(held: dict[str, torch.Tensor]) -> dict[str, int]:
    """Of each tensor in plain memory a sum of its bits, which hardly any change leaves as it was."""
    by_device: dict[torch.device, dict[str, torch.Tensor]] = {}
    factors: dict[torch.device, torch.Tensor] = {}
    with torch.no_grad():
        for name, tensor in held.items():
            if not _is_plain(tensor):
                continue
            there = tensor.device
            if there not in factors:
                factors[there] = _factors(_PIECE[there.type == "cpu"]).to(there)
            by_device.setdefault(there, {})[name] = _sum_of_bits(tensor.detach(), factors[there])
    # one wait for a device
    listed = [dict(zip(found, torch.stack([*found.values()]).tolist(), strict=True)) for found in by_device.values()]
    return {name: number for found in listed for name, number in found.items()}


def _is_plain(tensor: torch.Tensor) -> bool:
    is_memory = type(tensor) in (torch.Tensor, nn.Parameter, nn.Buffer) and tensor.layout is torch.strided
    is_lazy = tensor.is_meta or tensor.is_quantized or tensor.is_conj() or tensor.is_neg()
    return is_memory and not is_lazy


def _sum_of_bits(tensor: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    flat = tensor.reshape(-1).contiguous().view(torch.uint8)
    words = flat[: len(flat) // 8 * 8]
    if words.storage_offset() % 8:
        words = words.clone()
    found = flat[len(words) :].sum()
    for piece in words.view(torch.int64).split(len(factors)):
        # each by a number of its own: that signs or rows change places is seen as well
        found += ((piece ^ (piece >> 32)) * factors[: len(piece)]).sum()
    return found


@lru_cache(maxsize=2)
def _factors(count: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(-(2**63), 2**63, count))


def _contents(module: nn.Module) -> list[tuple[str, Any, Any]]:
    """What may be added to in place, beside a copy: lists, sets and dictionaries, those of hooks among them."""
    held = vars(module).items()
    return [(name, value, value.copy()) for name, value in held if isinstance(value, list | dict | set)]


def _refill(held: Any, content: Any) -> None:
    # the object itself stays: whoever holds a hook's handle knows its dictionary by identity
    if _parts(held) == _parts(content):
        return
    if isinstance(held, list):
        held[:] = content
    else:
        held.clear()
        held.update(content)


def _parts(held: Any) -> list[int]:
    return list(map(id, [*held, *held.values()] if isinstance(held, dict) else held))


def _equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.shape == right.shape and bool(((left == right) | ((left != left) & (right != right))).all())
