from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from tests.flow.convolutions import windows
from tests.flow.shown import batch_of, show

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def convolutions(draw):
    dims = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 2, 3]))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(dims))
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 2)),
        kernel,
        stride=tuple(draw(st.integers(1, 2)) for _ in range(dims)),
        padding=tuple(draw(st.integers(0, 2)) for _ in range(dims)),
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        dtype=torch.float64,
    )
    sizes = [draw(st.integers(d * (k - 1) + 3, d * (k - 1) + 5)) for k, d in zip(kernel, dilation, strict=True)]
    return layer, torch.randn(draw(st.integers(2, 3)), layer.in_channels, *sizes, dtype=torch.float64)


@SETTINGS
@given(convolutions())
def test_convolution_is_its_explicit_windows(case):
    layer, x = case
    shown = show(layer, batch_of(x))
    (site,) = shown.discovery.sites
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padding = [size for pad in reversed(layer.padding) for size in (pad, pad)]
    padded = functional.pad(x, padding, mode=mode).numpy()
    expected = windows(padded, layer.kernel_size, layer.stride, layer.dilation, layer.groups)
    np.testing.assert_array_equal(shown.x[site.name], expected)
    w = site.pattern_UD.numpy().reshape(layer.groups, -1, site.fan_in)
    z = np.einsum("nsgd,gud->nsgu", expected, w).reshape(*expected.shape[:2], -1) + site.bias_U.numpy()
    np.testing.assert_allclose(shown.z[site.name], z, atol=1e-12)
    sums = shown.last[site.name].input_sums()
    np.testing.assert_allclose(sums.sum_LSG, expected.sum(-1), atol=1e-10)
    np.testing.assert_allclose(sums.square_LSG, (expected**2).sum(-1), atol=1e-10)
    np.testing.assert_allclose(
        sums.centred_LSG, ((expected - expected.mean(-1, keepdims=True)) ** 2).sum(-1), atol=1e-10
    )


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_centred_sums_do_not_cancel(offset):
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64) + offset
    shown = show(nn.Conv2d(3, 2, 3, dtype=torch.float64), batch_of(x))
    (name,) = shown.x
    patches = shown.x[name].numpy().astype(np.longdouble)
    exact = ((patches - patches.mean(-1, keepdims=True)) ** 2).sum(-1)
    np.testing.assert_allclose(shown.last[name].input_sums().centred_LSG, exact.astype(float), rtol=1e-9)


def test_padded_positions_are_marked():
    shown = show(nn.Conv2d(1, 1, 3, padding=1), batch_of(torch.randn(2, 1, 4, 5)))
    (shown_padded,) = [p.padded_S for p in shown.last.values()]
    border = torch.ones(4, 5, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    assert torch.equal(shown_padded, border.flatten())


def test_batch_norm_is_folded_with_negative_gains(randomised):
    model = nn.Sequential(nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True)).eval()
    randomised(model)
    x = torch.randn(3, 2, 7, 7)
    shown = show(model, batch_of(x))
    conv, norm, _ = model
    gain = (norm.weight / (norm.running_var + norm.eps).sqrt()).double()
    site = shown.site("0")
    assert (gain < 0).any()
    assert site.folded == ("1",)
    assert site.gate == "relu"
    torch.testing.assert_close(site.pattern_UD, conv.weight.flatten(1).double() * gain[:, None])
    torch.testing.assert_close(site.raw_UD, conv.weight.flatten(1).double())
    with torch.no_grad():
        z = norm(conv(x))
    torch.testing.assert_close(shown.z["0"], z.flatten(2).transpose(1, 2), rtol=0, atol=0)
    torch.testing.assert_close(shown.a["0"], z.relu().flatten(2).transpose(1, 2), rtol=0, atol=0)


def test_layer_norm_gain_is_folded_where_it_feeds_the_site_alone(randomised):
    model = randomised(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4), nn.ReLU()))
    x = torch.randn(5, 6) * 3 + 2
    shown = show(model, batch_of(x))
    site, norm = shown.site("1"), model[0]
    torch.testing.assert_close(site.pattern_UD, (model[1].weight * norm.weight).double())
    torch.testing.assert_close(site.bias_U.float(), (model[1].bias + model[1].weight @ norm.bias))
    torch.testing.assert_close(shown.x["1"][:, 0, 0], functional.layer_norm(x, (6,)))
    assert site.folded == ("0",)


def test_in_place_gate_leaves_the_pre_activation_alone():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 2))
    x = torch.randn(6, 4)
    shown = show(model, batch_of(x))
    torch.testing.assert_close(shown.z["0"][:, 0], model[0](x))
    assert (shown.z["0"] < 0).any()
    torch.testing.assert_close(shown.out, model(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_dtype_is_within_its_tolerance(dtype):
    model = nn.Sequential(nn.Conv1d(3, 4, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(32, 5)).to(dtype)
    shown = show(model, batch_of(torch.randn(3, 3, 8, dtype=dtype)))
    assert [site.gate for site in shown.discovery.sites] == ["gelu", "identity"]
    assert all(z.dtype == dtype for z in shown.z.values())


def test_pre_activations_are_views_not_copies():
    model = nn.Conv2d(2, 3, 3)
    x = torch.randn(2, 2, 5, 5)
    shown = show(model, batch_of(x))
    (presentations,) = shown.last.values()
    assert presentations.z_LSU.stride() == (27, 1, 9)
