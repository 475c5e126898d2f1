"""Classes of tensors: one of another name is followed as a plain tensor is, one that computes its own way refused."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn
from torch.masked import masked_tensor
from torch.nn import functional

from pipeline.batch import Batch
from pipeline.errors import ModelError
from pipeline.flow.discover import discover
from pipeline.measure import measure
from tests.flow.models import Free


class Named(torch.Tensor):
    """A name alone, as of images."""


class Keeping(torch.Tensor):
    """Computes what torch computes, and keeps something beside it, as of medical images."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(made, cls):
            made.__dict__.update(next(vars(one) for one in args if isinstance(one, cls)))
        return made


class Doubling(torch.Tensor):
    """A relu of its own."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = super().__torch_function__(func, types, args, kwargs or {})
        return made * 2 if func is functional.relu else made


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5), nn.ReLU()]
    return nn.Sequential(*layers).eval()


def images() -> torch.Tensor:
    return torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", [Named, Keeping])
def test_a_batch_of_another_class_is_measured_as_a_plain_one(kind: type[torch.Tensor]) -> None:
    model, label = network(), torch.arange(8) % 5
    plain = measure(model, [(images(), label)], classes=5)
    named = measure(model, [(images().as_subclass(kind), label)], classes=5)
    assert plain["sites"]["gate"].to_pylist() == ["relu", "relu"]
    for table in plain:
        pd.testing.assert_frame_equal(named[table].to_pandas(), plain[table].to_pandas())


@pytest.mark.parametrize(("module", "name"), [(0, "weight"), (1, "weight"), (1, "running_mean")])
def test_weights_and_buffers_of_another_class_are_read(module: int, name: str) -> None:
    model = network()
    held = getattr(model[module], name).detach().as_subclass(Named)
    setattr(model[module], name, nn.Parameter(held) if name == "weight" else held)
    found = discover(model, Batch(inputs=(images(),), uid_N=torch.arange(8)))
    assert [(site.name, site.gate) for site in found.sites] == [("0", "relu"), ("4", "relu")]
    assert found.unread == ()


def refused(model: nn.Module, x: torch.Tensor) -> str:
    with pytest.raises(ModelError) as raised:
        discover(model, Batch(inputs=(x,), uid_N=torch.arange(3)))
    return str(raised.value)


def test_a_class_that_computes_its_own_way_is_refused() -> None:
    model, x = nn.Sequential(nn.Linear(4, 5)), torch.randn(3, 4)
    relu = nn.Sequential(nn.ReLU(), nn.Linear(4, 5))
    assert "class Doubling, by whose own functions" in refused(relu, x.as_subclass(Doubling))
    model[0].weight = nn.Parameter(model[0].weight.detach().as_subclass(Doubling))
    assert refused(model, x).startswith("0.weight is of class Doubling")


def test_a_class_that_the_forward_makes_is_refused() -> None:
    model = Free(lambda self, x: self.layer(x.as_subclass(Named)).relu(), layer=nn.Linear(4, 5))
    assert "makes tensors of class Named" in refused(model, torch.randn(3, 4))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_and_masked_tensors_are_refused() -> None:
    model, rows = nn.Linear(4, 5), list(torch.randn(3, 2, 4))
    assert "nested tensor" in refused(model, torch.nested.nested_tensor(rows))
    assert "nested tensor" in refused(model, torch.nested.nested_tensor(rows, layout=torch.jagged))
    x = torch.randn(3, 4)
    with pytest.warns(UserWarning, match="prototype"):
        assert "class MaskedTensor" in refused(model, masked_tensor(x, x > 0))

    def nest(self, x):
        return self.layer(torch.nested.nested_tensor(list(x))).to_padded_tensor(0.0)

    assert "makes a nested tensor" in refused(Free(nest, layer=model), torch.randn(3, 2, 4))
