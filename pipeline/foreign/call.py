"""How a loaded model is shown rows, and which of what it returns are the scores of classes.

Layer 2: pure torch. N rows, C classes.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from pipeline.batch import Batch
from pipeline.errors import ModelError


@dataclass(frozen=True)
class Call:
    """What a batch holds, handed to the forward under other names, and what it returns made one tensor of scores.

    names    of the forward's arguments for the batch's inputs and then its keyword arguments; None: as they are
    classes  how many scores of classes a row has; 0: none are looked for
    """

    names: tuple[str, ...] | None
    classes: int

    def shown(self, batch: Batch) -> Batch:
        """The batch as the model takes it. Which positions are padding stays known, whatever the model is told."""
        if self.names is None:
            return replace(batch, call=self)
        given = [*batch.inputs, *batch.kwargs.values()]
        named = {name: _as_named(name, value) for name, value in zip(self.names, given, strict=False)}
        return replace(batch, inputs=(), kwargs=named, call=self)

    def __call__(self, model: nn.Module, batch: Batch) -> Any:
        """Run the model; its class scores (N, C) if it returns such, None if it returns something else with rows."""
        try:
            inspect.signature(model.forward).bind(*batch.inputs, **batch.kwargs)
        except TypeError as error:
            given = [*(["x"] * len(batch.inputs)), *batch.kwargs]
            raise ModelError(
                f"its forward does not take ({', '.join(given)}): {error}; load.inputs can name what rows give it"
            ) from None
        return self._scores(model(*batch.inputs, **batch.kwargs))

    def _scores(self, out: Any) -> Any:
        if isinstance(out, Mapping):  # what models of transformers return
            out = out.get("logits")
        if isinstance(out, torch.Tensor) and (out.ndim != 2 or out.shape[1] == self.classes):
            return out
        return None


def _as_named(name: str, value: Any) -> Any:
    # models of transformers count and add masks
    return value.long() if name == "attention_mask" and value.dtype == torch.bool else value
