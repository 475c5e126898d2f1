"""Everything one batch presents to a model, copied while it is hot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipeline.batch import Batch
from pipeline.flow.discover import Discovery, discover
from pipeline.flow.tap import tapped_forward
from pipeline.sites import Presentations


@dataclass
class Shown:
    """All presentations of one batch, copied while they were hot, by site name."""

    discovery: Discovery
    out: Any
    z: dict[str, torch.Tensor]
    a: dict[str, torch.Tensor]
    x: dict[str, torch.Tensor]
    last: dict[str, Presentations]
    calls: dict[str, int]

    def site(self, name: str):
        return next(site for site in self.discovery.sites if site.name == name)


def show(model: nn.Module, batch: Batch, *, probe: Batch | None = None, **selection: Any) -> Shown:
    found = discover(model, probe or batch, **selection)
    shown = Shown(found, None, {}, {}, {}, {}, {})

    def observe(presentations: Presentations) -> None:
        name = presentations.site.name
        for kept, value in (
            (shown.z, presentations.z_LSU),
            (shown.a, presentations.a_LSU),
            (shown.x, presentations.patches(0, presentations.entries)),
        ):
            kept[name] = value.clone() if name not in kept else torch.cat([kept[name], value])
        presentations.input_sums()
        shown.last[name] = presentations
        shown.calls[name] = shown.calls.get(name, 0) + 1

    shown.out = tapped_forward(model, found, batch, observe)
    return shown


def batch_of(*inputs: Any, rows: int | None = None, **fields: Any) -> Batch:
    rows = rows if rows is not None else inputs[0].shape[0]
    return Batch(inputs=inputs, uid_N=torch.arange(rows), **fields)
