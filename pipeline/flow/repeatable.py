"""What a forward must leave as it found it for a second one over the same batch to do the same.

Layer 1.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import nn

from pipeline.flow.holdings import held_tensors
from pipeline.flow.registers import PLAIN


def surroundings(model: nn.Module) -> Any:
    """What a model keeps and the states of all generators, to be compared: equal if nothing of it was changed."""
    held = {
        key: (path, None if one.is_inference() else one._version) for key, (path, one) in held_tensors(model).items()
    }
    plain = {
        (path, name): value if isinstance(value, PLAIN) else (id(value), len(value))
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if name != "training" and isinstance(value, (*PLAIN, list, dict, set))
    }
    return held, plain, random.getstate(), _drawn()


def _drawn() -> list[list[int]]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        states += torch.cuda.get_rng_state_all()
    return [state.tolist() for state in states]
