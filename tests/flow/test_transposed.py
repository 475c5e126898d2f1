"""Transposed convolutions by their definition: every input adds its kernel to the output."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.flow.shown import batch_of, show


@st.composite
def layers(draw):
    dims = draw(st.integers(1, 2))
    groups = draw(st.sampled_from([1, 2]))
    stride = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(dims))
    layer = (nn.ConvTranspose1d, nn.ConvTranspose2d)[dims - 1](
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 2)),
        tuple(draw(st.integers(1, 4)) for _ in range(dims)),
        stride=stride,
        padding=tuple(draw(st.integers(0, 1)) for _ in range(dims)),
        output_padding=tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)),
        dilation=dilation,
        groups=groups,
        dtype=torch.float64,
    )
    sizes = [draw(st.integers(3, 5)) for _ in range(dims)]
    return layer, torch.randn(2, layer.in_channels, *sizes, dtype=torch.float64)


def scattered(layer, x: np.ndarray, out: tuple[int, ...]) -> np.ndarray:
    """Output by scattering: z[o] += x[i] · w[k] where o = i·stride + k·dilation − padding."""
    w, groups = layer.weight.detach().numpy(), layer.groups
    z = np.zeros((len(x), layer.out_channels, *out)) + layer.bias.detach().numpy().reshape(1, -1, *[1] * len(out))
    per_in, per_out = x.shape[1] // groups, layer.out_channels // groups
    for channel, place in itertools.product(range(x.shape[1]), itertools.product(*map(range, x.shape[2:]))):
        group = channel // per_in
        for tap in itertools.product(*map(range, w.shape[2:])):
            at = tuple(
                i * s + k * d - p
                for i, s, k, d, p in zip(place, layer.stride, tap, layer.dilation, layer.padding, strict=True)
            )
            if all(0 <= a < size for a, size in zip(at, out, strict=True)):
                units = slice(group * per_out, (group + 1) * per_out)
                z[(slice(None), units, *at)] += (
                    x[(slice(None), channel, *place)][:, None] * w[(channel, slice(None), *tap)]
                )
    return z


@settings(max_examples=50, deadline=None, derandomize=True)
@given(layers())
def test_each_phase_is_its_own_kernel(case):
    layer, x = case
    with torch.no_grad():
        made = layer(x)
    np.testing.assert_allclose(scattered(layer, x.numpy(), tuple(made.shape[2:])), made, atol=1e-12)
    shown = show(layer, batch_of(x))
    met = 0
    for site in shown.discovery.sites:
        assert site.kind == f"conv_transpose{x.dim() - 2}d"
        w = site.pattern_UD.numpy().reshape(site.groups, -1, site.fan_in)
        z = np.einsum("lsgd,gud->lsgu", shown.x[site.name].numpy(), w)
        z = z.reshape(*z.shape[:2], -1) + site.bias_U.numpy()
        np.testing.assert_allclose(z, shown.z[site.name], atol=1e-12)
        met += shown.z[site.name].shape[1]
    # phases that no tap reaches give the bias alone; all others are met, each position once
    reached = len(shown.discovery.sites) / np.prod(layer.stride)
    assert met <= made[0, 0].numel()
    if reached == 1:
        assert met == made[0, 0].numel()
        everything = torch.cat([shown.z[site.name].flatten() for site in shown.discovery.sites])
        np.testing.assert_allclose(everything.sort().values, made.flatten().sort().values, atol=1e-12)
    kernels = sum(site.pattern_UD.square().sum() for site in shown.discovery.sites)
    torch.testing.assert_close(kernels, layer.weight.detach().square().sum())


def test_a_folded_norm_and_a_gate_reach_every_phase(randomised):
    model = randomised(nn.Sequential(nn.ConvTranspose2d(3, 4, 4, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU()))
    x = torch.randn(2, 3, 5, 5)
    shown = show(model, batch_of(x))
    with torch.no_grad():
        z = model[1](model[0](x))
    assert [site.name for site in shown.discovery.sites] == ["0.phase0x0", "0.phase0x1", "0.phase1x0", "0.phase1x1"]
    # kernel 4, stride 2, padding 1: phase 0 begins at output 1
    torch.testing.assert_close(shown.z["0.phase0x0"], z[:, :, 1::2, 1::2].flatten(2).transpose(1, 2))
    torch.testing.assert_close(shown.a["0.phase1x0"], z[:, :, 0::2, 1::2].relu().flatten(2).transpose(1, 2))
    assert {site.folded for site in shown.discovery.sites} == {("1",)}
