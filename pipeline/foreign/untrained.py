"""The untrained twin of a model that was made elsewhere: built anew, all its weights drawn by its own constructor.

Layer 2: pure torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from pipeline.batch import Batch
from pipeline.errors import CensusError, ModelError, is_machines_fault
from pipeline.fit.rows import SAMPLE_ROWS
from pipeline.hashing import splitmix64
from pipeline.models.norms import reestimated


def untrained(build: Callable[[], nn.Module], seed: int, rows: Iterable[Batch] = ()) -> nn.Module | None:
    """A new module in eval mode, its BatchNorm statistics those of `rows`: (0, 1) would be a broken control.

    None where a weight is left as the memory has it: nothing says how such a model begins. ModelError where it refuses
    the rows.
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
    if lazy := [name for name, value in module.named_parameters() if is_lazy(value)]:
        raise ModelError(f"parameter {lazy[0]} has no shape yet: a builder makes all weights, expected no lazy modules")
    if any(bool(value.isnan().any()) for value in module.state_dict().values() if value.is_floating_point()):
        return None
    try:
        return reestimated(module, rows, rows=SAMPLE_ROWS)
    except Exception as error:  # whatever the model's code raises
        if isinstance(error, CensusError) or is_machines_fault(error):
            raise
        raise ModelError(f"its forward refuses the data: {type(error).__name__}: {error}") from error
