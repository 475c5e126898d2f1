"""Data types, memory layouts and precision: presentations are the model's own numbers, and copies of none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.flow.discover import discover
from pipeline.flow.tap import tapped_forward
from tests.flow.models import Free, numbers
from tests.flow.shown import batch_of, show


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2), nn.SiLU()
    ).eval()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_presentations_are_in_the_dtype_of_the_model(dtype):
    x = torch.randn(2, 3, 7, 7, dtype=dtype)
    shown = show(network().to(dtype), batch_of(x))
    assert [site.gate for site in shown.discovery.sites] == ["relu", "silu"]
    for name in shown.z:
        assert shown.z[name].dtype == shown.a[name].dtype == shown.x[name].dtype == dtype
        assert shown.last[name].input_sums().sum_LSG.dtype == torch.float64
        assert shown.site(name).pattern_UD.dtype == torch.float64


def test_autocast_inside_the_call():
    def call(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return model(*batch.inputs)

    model = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 2))
    shown = show(model, batch_of(torch.randn(4, 6), call=call))
    assert [site.gate for site in shown.discovery.sites] == ["gelu", "identity"]
    assert shown.z["0"].dtype == torch.bfloat16
    assert all(site.error < 2e-2 for site in shown.discovery.sites)


@pytest.mark.parametrize("channels_last", [False, True])
def test_z_and_a_are_views_of_what_the_model_computed(channels_last):
    model, x = network(), torch.randn(2, 3, 7, 7)
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    found = discover(model, batch_of(x))
    pointers, outputs = {}, {}
    for name, module in model.named_children():
        module.register_forward_hook(lambda module, args, out, name=name: outputs.update({name: out}))

    def observe(presentations):
        name = presentations.site.name
        pointers[name] = (presentations.z_LSU.data_ptr(), presentations.a_LSU.data_ptr())

    tapped_forward(model, found, batch_of(x), observe)
    assert pointers == {
        "0": (outputs["1"].data_ptr(), outputs["2"].data_ptr()),
        "3": (outputs["3"].data_ptr(), outputs["4"].data_ptr()),
    }


def test_a_transposed_view_is_no_copy_either():
    model = Free(lambda self, x: self.c(x.mT).mT.relu(), c=nn.Conv1d(3, 4, 3, dtype=torch.float64))
    found = discover(model, batch_of(numbers(2, 9, 3)))
    seen = []
    tapped_forward(model, found, batch_of(numbers(2, 9, 3)), lambda p: seen.append(p.z_LSU.stride()))
    assert seen == [(28, 1, 7)]


def test_patches_of_any_range_are_those_of_all():
    shown = show(network(), batch_of(torch.randn(5, 3, 7, 7)))
    for presentations in shown.last.values():
        whole = presentations.patches(0, 5)
        for start, stop in ((0, 0), (1, 3), (4, 5)):
            torch.testing.assert_close(presentations.patches(start, stop), whole[start:stop])


def test_rows_chosen_from_presentations_are_those_rows():
    shown = show(network(), batch_of(torch.randn(5, 3, 7, 7)))
    keep = torch.tensor([True, False, True, True, False])
    for presentations in shown.last.values():
        chosen = presentations.select_rows(keep)
        torch.testing.assert_close(chosen.z_LSU, presentations.z_LSU[keep])
        torch.testing.assert_close(chosen.patches(1, 3), presentations.patches(0, 5)[keep][1:3])
        sums, whole = chosen.input_sums(), presentations.input_sums()
        torch.testing.assert_close(sums.square_LSG, whole.square_LSG[keep])


def test_the_same_bytes_twice():
    model, x = network(), torch.randn(4, 3, 9, 9)
    first, second = show(model, batch_of(x)), show(model, batch_of(x))
    for name in first.z:
        assert torch.equal(first.z[name], second.z[name])
        assert torch.equal(first.a[name], second.a[name])
    assert torch.equal(first.out, second.out)
    with torch.inference_mode():
        assert torch.equal(first.out, model(x))


def test_where_nothing_finite_can_be_compared_there_is_no_error() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[0] = torch.nan
        model[2].weight[:] = torch.nan
    first, second = discover(model, batch_of(torch.randn(5, 3))).sites
    assert first.error is not None
    assert first.error < 1e-6
    assert second.error is None
