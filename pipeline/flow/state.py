"""What a model keeps on itself between forwards: refused where it is a buffer, found and put back where it is not.

Layer 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pipeline.errors import ModelError


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Refuse a model that changes its buffers in eval mode; put back whatever else it keeps on itself."""
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    kept = [(module, _kept(module)) for module in model.modules()]
    contents = [(tensor, tensor.detach().clone()) for tensor in plain_tensors(model).values()]
    try:
        yield
    finally:
        for module, attributes in kept:
            vars(module).update(attributes)
            for added in vars(module).keys() - attributes.keys():
                del vars(module)[added]
        for tensor, before in contents:
            if not _equal(before, tensor):
                tensor.detach().copy_(before)
    for name, buffer in model.named_buffers():
        if name not in buffers or not _equal(buffers[name], buffer):
            raise ModelError(
                f"buffer {name} changes in a forward pass in eval mode: a measurement would depend on the order of "
                "batches; make the update conditional on self.training"
            )


def _kept(module: nn.Module) -> dict[str, Any]:
    # lists and dictionaries may be added to in place
    return {name: value.copy() if type(value) in (list, dict) else value for name, value in vars(module).items()}


def plain_tensors(model: nn.Module) -> dict[tuple[str, str], torch.Tensor]:
    """Tensors that modules hold as plain attributes, by (module path, name)."""
    return {
        (path, name): value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, torch.Tensor)
    }


def _equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.shape == right.shape and bool(((left == right) | ((left != left) & (right != right))).all())
