"""What a tapped forward leaves behind: nothing; and what it makes once for several sites."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from pipeline.batch import Batch
from pipeline.flow.discover import discover
from pipeline.flow.gradients import observe_gradients
from pipeline.flow.tap import tapped_forward
from pipeline.input_forms import InputSums
from pipeline.models.base import Task
from tests.models.build import build


@pytest.mark.parametrize("observed", [tapped_forward, partial(observe_gradients, classes=3)])
def test_no_tensor_outlives_its_forward(observed: Callable[..., object]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)
    )
    batch = Batch((torch.randn(5, 1, 8, 8),), torch.arange(5), torch.arange(5) % 3)
    discovery = discover(model.eval(), batch)
    observed(model, discovery, batch, lambda _: None)
    gc.collect()
    gc.disable()
    try:
        before = _tensors()
        observed(model, discovery, batch, lambda _: None)
        assert _tensors() == before
    finally:
        gc.enable()


def _tensors() -> int:
    """How many tensors there are."""
    return sum(type(one) is torch.Tensor for one in gc.get_objects())


def test_sites_that_are_shown_the_same_x_share_its_sums() -> None:
    model = build("transformer", Task((6,), 4, vocabulary=20), layers=1, width=8, heads=2)
    batch = Batch((torch.randint(20, (3, 6)),), torch.arange(3))
    discovery = discover(model, batch)
    sums: dict[str, InputSums] = {}
    tapped_forward(model, discovery, batch, lambda one: sums.setdefault(one.site.name, one.input_sums()) and None)
    attention = [sums[f"blocks.0.{name}"] for name in ("query", "key", "value")]
    assert attention[0] is attention[1] is attention[2]
    assert sums["blocks.0.out"] is not attention[0]
    assert sums["blocks.0.up"] is not attention[0]
