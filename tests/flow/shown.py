"""Everything one batch presents to a model, copied while it is hot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from pipeline.batch import Batch
from pipeline.flow.discover import Discovery, discover
from pipeline.flow.forwards import Forwards
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
    expect_the_same_by_script(model, found, batch)
    return shown


def expect_the_same_by_script(model: nn.Module, found: Discovery, batch: Batch) -> Forwards:
    """Five forwards of a batch present the same, with or without a script; returns what ran them."""
    forwards, runs = Forwards(found), list[list[Presentations]]()
    for _ in range(5):
        kept: list[Presentations] = []
        forwards.run(model, batch, lambda presented, kept=kept: kept.append(copied(presented)))
        runs.append(kept)
    first = runs[0]
    for other in runs[1:]:
        assert [one.site.name for one in other] == [one.site.name for one in first]
        # a model that carries a state on does the same no second time, and has no script
        for one, expected in zip(other, first, strict=True) if forwards.scripts else ():
            expect_equal(one, expected)
    return forwards


def shown_by(run: Callable[[Callable[[Presentations], None]], Any]) -> tuple[list[Presentations], Any]:
    kept: list[Presentations] = []
    return kept, run(lambda presented: kept.append(copied(presented)))


def expect_as_tapped(forwards: Forwards, model: nn.Module, batch: Batch) -> None:
    """The next forward presents, and returns, what the tap does."""
    found = forwards.discovery
    seen, out = shown_by(lambda observe: forwards.run(model, batch, observe))
    wanted, expected = shown_by(lambda observe: tapped_forward(model, found, batch, observe))
    assert [one.site.name for one in seen] == [one.site.name for one in wanted]
    for one, other in zip(seen, wanted, strict=True):
        expect_equal(one, other)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def copied(presented: Presentations) -> Presentations:
    x, sums = presented.patches(0, presented.entries).clone(), presented.input_sums()
    return replace(
        presented,
        **{name: _clone(getattr(presented, name)) for name in TENSORS},
        patches=lambda start, stop: x[start:stop],
        input_sums=lambda: sums,
    )


TENSORS = (
    *("z_LSU", "a_LSU", "affine_LSU", "row_L", "mask_LS", "position_LS", "padded_S", "label_LS"),
    *("uid_N", "label_N"),
)


def _clone(tensor: torch.Tensor | None) -> torch.Tensor | None:
    # the strides as they are
    return None if tensor is None else tensor.clone(memory_format=torch.preserve_format)


def expect_equal(one: Presentations, expected: Presentations) -> None:
    """Bit by bit, and with the same strides."""
    for name in TENSORS:
        value, wanted = getattr(one, name), getattr(expected, name)
        assert (value is None) == (wanted is None), name
        if value is not None:
            torch.testing.assert_close(value, wanted, rtol=0, atol=0, equal_nan=True, check_stride=True, msg=name)
    pairs = [
        (one.patches(0, one.entries), expected.patches(0, expected.entries)),
        *zip(vars(one.input_sums()).values(), vars(expected.input_sums()).values(), strict=True),
    ]
    for value, wanted in pairs:
        if isinstance(wanted, torch.Tensor):
            torch.testing.assert_close(value, wanted, rtol=0, atol=0, equal_nan=True)
    assert (one.windows is None) == (expected.windows is None)


def batch_of(*inputs: Any, rows: int | None = None, **fields: Any) -> Batch:
    rows = rows if rows is not None else inputs[0].shape[0]
    return Batch(inputs=inputs, uid_N=torch.arange(rows), **fields)
