"""What a forward leaves behind, on the model and in generators: refused where it is a buffer, else put back.

Layer 1.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.errors import ModelError
from pipeline.flow.holdings import plain_tensors


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Refuse a model that changes its buffers in eval mode; put back what else it keeps on itself, and draws from."""
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    kept = [(module, dict(vars(module)), _contents(module)) for module in model.modules()]
    contents = [(tensor, tensor.detach().clone()) for tensor in plain_tensors(model).values()]
    try:
        with undrawn():
            yield
    finally:
        for module, attributes, contents_of in kept:
            vars(module).update(attributes)
            for added in vars(module).keys() - attributes.keys():
                del vars(module)[added]
            for held, content in contents_of:
                _refill(held, content)
        for tensor, before in contents:
            if not _equal(before, tensor):
                tensor.detach().copy_(before)
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


def versions(model: nn.Module) -> dict[str, Hashable]:
    """Which tensors the parameters are, and how often each was written to: equal as long as torch changed none."""
    held = model.named_parameters(remove_duplicate=False)
    return {name: (id(one), None if one.is_inference() else one._version) for name, one in held}


def _contents(module: nn.Module) -> list[tuple[Any, Any]]:
    """What may be added to in place, beside a copy: lists, sets and dictionaries, those of hooks among them."""
    return [(value, value.copy()) for value in vars(module).values() if isinstance(value, list | dict | set)]


def _refill(held: Any, content: Any) -> None:
    # the object itself stays: whoever holds a hook's handle knows its dictionary by identity
    if list(map(id, _parts(held))) == list(map(id, _parts(content))):
        return
    if isinstance(held, list):
        held[:] = content
    else:
        held.clear()
        held.update(content)


def _parts(held: Any) -> list[Any]:
    return [*held, *held.values()] if isinstance(held, dict) else list(held)


def _equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.shape == right.shape and bool(((left == right) | ((left != left) & (right != right))).all())
