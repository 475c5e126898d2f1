"""One batch of rows as a model takes it, and as its rows are named.

Layer 0: imports nothing of the pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Batch:
    """Rows of a data set, decoded to what a model's forward takes.

    inputs   positional arguments of the model's forward (each a tensor, or any pytree of tensors)
    uid_N    int64, ≥ 0, unique in the data set, the row's name: stable under re-sharding
    label_N  int64 class of each row, −1 where unknown; None if the data has none
    label_NS int64 class of each position of a row, in order (a picture's line by line), −1 where unknown; else None
    kwargs   keyword arguments of the forward
    mask_NS  bool, True where a position of a row is real and not padding; None if every position is
    position_axes  axes of the first input that count those positions; None: the only ones of their number
    call     how to call the model, `call(model, batch)`, where `model(*inputs, **kwargs)` is not it
    narrow   True where whole numbers of the inputs take fewer bytes than a model's int64: `devices.moved` widens them
    """

    inputs: tuple[Any, ...]
    uid_N: torch.Tensor
    label_N: torch.Tensor | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    mask_NS: torch.Tensor | None = None
    label_NS: torch.Tensor | None = field(default=None, kw_only=True)
    call: Callable[[torch.nn.Module, Batch], Any] | None = None
    position_axes: tuple[int, ...] | None = field(default=None, kw_only=True)
    narrow: bool = field(default=False, kw_only=True)

    @property
    def rows(self) -> int:
        """How many rows the batch has."""
        return int(self.uid_N.shape[0])

    def forward(self, model: torch.nn.Module) -> Any:
        """Run the model on this batch and return what it returns; RuntimeError where it would end the program."""
        try:
            if self.call is not None:
                return self.call(model, self)
            return model(*self.inputs, **self.kwargs)
        except SystemExit as error:
            raise RuntimeError(f"it would end the program (SystemExit: {error})") from error


def misnamed(uid_N: Any) -> str | None:
    """What is wrong with the uids of some rows: they are int64, one for each row, none negative or twice the same."""
    if not isinstance(uid_N, torch.Tensor) or uid_N.dtype != torch.int64 or uid_N.dim() != 1:
        is_tensor = isinstance(uid_N, torch.Tensor)
        dtype = f"{str(uid_N.dtype).removeprefix('torch.')} of shape {tuple(uid_N.shape)}" if is_tensor else ""
        found = dtype or f"a {type(uid_N).__name__}"
        return f"uid_N is {found}: expected a tensor of int64, one for each row"
    if not len(uid_N) or (int(uid_N[0]) >= 0 and bool((uid_N[1:] > uid_N[:-1]).all())):
        # as rows of a file are named: nothing need be sorted
        return None
    if int(uid_N.min()) < 0:
        return f"uid_N has {int(uid_N.min())}: expected names from 0 on"
    value, times = uid_N.unique(return_counts=True)
    if len(value) == len(uid_N):
        return None
    most = times.argmax()
    return f"uid_N has {int(value[most])} {int(times[most])} times: expected another for each row"
