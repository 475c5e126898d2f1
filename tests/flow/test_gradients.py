"""Gradients at activations: those of PyTorch's own hooks, in every layout, leaving the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from pipeline.batch import Batch
from pipeline.flow.discover import discover
from pipeline.flow.gradients import observe_gradients
from pipeline.sites import Presentations


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.gate = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.gate(self.norm(self.first(x)))
        return self.gate(self.second(h).add_(x))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(functional.silu(self.gate(x)) * self.up(x)).mean(1)


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), Residual(4), nn.MaxPool2d(2),
        Residual(4), nn.Flatten(), nn.Linear(64, 8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, 3),
    )  # fmt: skip


def batch_of(x: torch.Tensor, labels: tuple[int, ...] = (0, 1, 2, 0, 1, 2)) -> Batch:
    return Batch(inputs=(x,), uid_N=torch.arange(len(x)), label_N=torch.tensor(labels))


def seen_by(model: nn.Module, batch: Batch) -> dict[str, Presentations]:
    found: dict[str, Presentations] = {}
    observe_gradients(model, discover(model, batch), batch, lambda one: found.update({one.site.name: one}), classes=3)
    return found


def hooked(model: nn.Module, batch: Batch, pick: Callable[[nn.Module], nn.Module]) -> tuple[torch.Tensor, torch.Tensor]:
    """The output of a module and the gradient of the summed log-loss at it, by a hook."""
    kept: list[torch.Tensor] = []

    def keep(module: nn.Module, args: object, out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        out.retain_grad()
        kept.append(out)
        # the model goes on with a copy that it may overwrite
        return out.clone()

    handle = pick(model).register_forward_hook(keep)
    loss = functional.cross_entropy(model(*batch.inputs), batch.label_N, reduction="sum")
    handle.remove()
    loss.backward()
    assert kept[0].grad is not None
    return kept[0].detach(), kept[0].grad


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_gradients_are_those_of_hooks() -> None:
    model = convolutional().eval()
    batch = batch_of(torch.randn(6, 1, 8, 8))
    found = seen_by(model, batch)
    assert list(found) == ["0", "3.first", "3.second", "5.first", "5.second", "7", "10"]
    for name, pick in {"0": 2, "7": 8}.items():
        a, gradient = hooked(model, batch, lambda net, pick=pick: net[pick])
        flat = (lambda value: value.flatten(2).transpose(1, 2)) if a.dim() == 4 else (lambda value: value[:, None])
        torch.testing.assert_close(found[name].a_LSU, flat(a), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found[name].gradient_LSU, flat(gradient), atol=1e-6, rtol=1e-5)


def test_a_gated_pair_s_gradient_is_that_of_the_product() -> None:
    model = Gated().eval()
    batch = batch_of(torch.randn(6, 5, 6))
    product = functional.silu(model.gate(batch.inputs[0])) * model.up(batch.inputs[0])
    product.retain_grad()
    functional.cross_entropy(model.down(product).mean(1), batch.label_N, reduction="sum").backward()
    shown = seen_by(model, batch)["gate"]
    torch.testing.assert_close(shown.a_LSU, product.detach())
    torch.testing.assert_close(shown.gradient_LSU, product.grad)


class Attending(nn.Module):
    """Fused q, k and v that no operation parts into three: they are known by heads alone."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 12), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        met = functional.scaled_dot_product_attention(q, k, v)
        return self.out(met.transpose(1, 2).flatten(2)).mean(1)


def test_gradients_of_fused_projections_are_parts_of_the_whole_s() -> None:
    model = Attending().eval()
    batch = batch_of(torch.randn(6, 5, 6))
    whole, gradient = hooked(model, batch, lambda net: net.qkv)
    found = seen_by(model, batch)
    for part, name in enumerate(("qkv.q", "qkv.k", "qkv.v")):
        torch.testing.assert_close(found[name].a_LSU, whole[..., 4 * part : 4 * part + 4])
        torch.testing.assert_close(found[name].gradient_LSU, gradient[..., 4 * part : 4 * part + 4])


def test_only_rows_with_a_label_are_shown() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).eval()
    x = torch.randn(6, 4)
    whole = seen_by(model, batch_of(x))
    some = seen_by(model, batch_of(x, (0, -1, 2, -1, 9, 2)))
    assert some["0"].uid_N.tolist() == [0, 2, 5]
    torch.testing.assert_close(some["0"].gradient_LSU, whole["0"].gradient_LSU[[0, 2, 5]])
    assert seen_by(model, batch_of(x, (-1,) * 6)) == {}
    assert seen_by(model, replace(batch_of(x), label_N=None)) == {}


def test_rows_do_not_disturb_each_other() -> None:
    model = convolutional().eval()
    x = torch.randn(6, 1, 8, 8)
    whole, alone = seen_by(model, batch_of(x)), seen_by(model, batch_of(x[:1], (0,)))
    for name, shown in alone.items():
        torch.testing.assert_close(shown.gradient_LSU[0], whole[name].gradient_LSU[0], atol=1e-6, rtol=1e-5)


def test_the_model_is_left_as_it_was() -> None:
    model = convolutional().train()
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen_by(model.eval(), batch_of(torch.randn(6, 1, 8, 8)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()][:3] == [False, False, True]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("outer", [torch.no_grad, torch.inference_mode])
def test_it_works_from_where_gradients_are_off(outer: Callable[[], object]) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    x = torch.randn(6, 4)
    wanted = seen_by(model, batch_of(x))
    with outer():
        found = seen_by(model, batch_of(x.clone()))
    assert list(found) == ["0", "2"]
    torch.testing.assert_close(found["0"].gradient_LSU.clone(), wanted["0"].gradient_LSU)


def test_an_activation_that_is_pooled_before_its_gate_is_left_out() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)).eval()
    assert list(seen_by(model, batch_of(torch.randn(6, 1, 8, 8)))) == ["4"]


def test_a_model_without_derivative_has_no_gradients() -> None:
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    class Net(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self[1](Opaque.apply(self[0](x)))

    model = Net(nn.Linear(4, 5), nn.Linear(5, 3)).eval()
    assert seen_by(model, batch_of(torch.randn(6, 4))) == {}


def test_running_out_of_memory_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(4, 3).eval()
    batch = batch_of(torch.randn(6, 4))
    found = discover(model, batch)

    def full(*args: object, **keywords: object) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(torch.autograd, "grad", full)
    with pytest.raises(torch.OutOfMemoryError):
        observe_gradients(model, found, batch, lambda one: None, classes=3)
