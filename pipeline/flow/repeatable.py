"""What a forward must leave as it found it for a second one over the same batch to do the same.

Layer 1.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import random
import warnings
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.flow.holdings import held_tensors

# code, and what an exported program says of itself: nothing that a forward changes
_CODE = (type, FunctionType, BuiltinFunctionType, ModuleType, torch._ops.OpOverload, torch.fx.Graph)


def surroundings(model: nn.Module) -> Any:
    """What a model keeps and the states of all generators, to be compared: equal if nothing of it was changed."""
    held = {key: (path, _version(one)) for key, (path, one) in held_tensors(model).items()}
    return held, _kept(model), random.getstate(), _drawn()


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


class _Writer(pickle.Pickler):
    """Writes what Python objects say, however deep; of tensors and code only which they are."""

    def persistent_id(self, one: Any) -> Any:
        """What stands for an object; None: what it holds."""
        if isinstance(one, torch.Tensor):
            return id(one), _version(one)
        if isinstance(one, torch.Generator):
            return one.get_state().tolist()
        return id(one) if isinstance(one, _CODE) else None

    def reducer_override(self, one: Any) -> Any:
        """A module by its attributes, whatever it says of how it is to be written."""
        if isinstance(one, nn.Module):
            return object, (), {name: value for name, value in vars(one).items() if name != "training"}
        return NotImplemented


def _kept(model: nn.Module) -> object:
    """The digest of all that modules hold; equal to nothing where some of it cannot be written down."""
    written = io.BytesIO()
    try:
        with warnings.catch_warnings(action="ignore"):
            _Writer(written).dump(model)
    except Exception:  # noqa: BLE001
        # an iterator or a lock, or whatever an object makes of being asked
        return object()
    return hashlib.blake2b(written.getbuffer()).hexdigest()


def _drawn() -> list[Any]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        states += torch.cuda.get_rng_state_all()
    return [*(state.tolist() for state in states), pickle.dumps(np.random.get_state())]
