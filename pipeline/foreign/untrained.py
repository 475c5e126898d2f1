"""The untrained twin of a model that was made elsewhere: built anew, all its weights drawn by its own constructor.

Layer 2: pure torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice

import torch
from torch import nn

from pipeline.batch import Batch
from pipeline.hashing import splitmix64

# rows that running statistics are taken from
ROWS = 4096


def untrained(build: Callable[[], nn.Module], seed: int, rows: Iterable[Batch] = ()) -> nn.Module | None:
    """A new module in eval mode, its BatchNorm statistics those of `rows`: (0, 1) would be a broken control.

    None where a weight is left as the memory has it: nothing says how such a model begins.
    """
    mode = torch.get_deterministic_debug_mode()
    try:
        # memory that nothing is written to then holds NaN, and of integers the greatest
        torch.set_deterministic_debug_mode("warn")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(splitmix64(seed))
            module = build()
    finally:
        torch.set_deterministic_debug_mode(mode)
    if any(bool(value.isnan().any()) for value in module.state_dict().values() if value.is_floating_point()):
        return None
    return reestimated(module, rows)


def running_norms(module: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The norms whose statistics are of the data that they have seen."""
    norms = (one for one in module.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm))
    return [norm for norm in norms if norm.track_running_stats]


def reestimated(module: nn.Module, rows: Iterable[Batch]) -> nn.Module:
    """The module in eval mode with the running statistics of the first ROWS rows, each norm behind the others'."""
    module.eval()
    norms = running_norms(module)
    if not norms:
        return module
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    seen = 0
    with torch.no_grad():
        for batch in islice(rows, ROWS):
            batch.forward(module)
            seen += batch.rows
            if seen >= ROWS:
                break
    return module.eval()
