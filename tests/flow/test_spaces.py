"""What inputs mean: receptive fields against gradients, upstream units against what changes when one is disturbed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from tests.flow.models import Free, linear, numbers
from tests.flow.shown import batch_of, show


@st.composite
def stacks(draw):
    dims = draw(st.integers(1, 2))
    conv = (nn.Conv1d, nn.Conv2d)[dims - 1]
    pools = [(nn.MaxPool1d, nn.AvgPool1d), (nn.MaxPool2d, nn.AvgPool2d)][dims - 1]
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 3))):
        if layers and draw(st.booleans()):
            kernel = draw(st.integers(1, 3))
            layers.append(draw(st.sampled_from(pools))(kernel, stride=draw(st.integers(1, 2)), padding=kernel // 2))
        layers.append(
            conv(
                2,
                2,
                draw(st.integers(1, 3)),
                stride=draw(st.integers(1, 2)),
                padding=draw(st.integers(0, 2)),
                dilation=draw(st.integers(1, 2)),
                dtype=torch.float64,
            )
        )
        layers.append(draw(st.sampled_from([nn.ReLU, nn.GELU, nn.Identity, nn.Dropout]))())
    return nn.Sequential(*layers), (2, 2, *[31] * dims)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(stacks())
def test_receptive_fields_are_where_gradients_come_from(case):
    model, shape = case
    for module in model:
        if isinstance(module, nn.modules.conv._ConvNd):
            nn.init.uniform_(module.weight, 0.5, 1.0)  # no product of weights cancels
    x = torch.rand(shape, dtype=torch.float64) + 1
    shown = show(model, batch_of(x))
    for site in shown.discovery.sites:
        _assert_field(site, model, x)


def _assert_field(site, model, x) -> None:
    number = int(site.name)
    x = x[:1].clone().requires_grad_()
    # sums instead of maxima: where a gradient may come from, not where it does
    h = x
    for module in list(model)[: number + 1]:
        if isinstance(module, nn.MaxPool1d):
            h = functional.avg_pool1d(h, module.kernel_size, module.stride, module.padding)
        elif isinstance(module, nn.MaxPool2d):
            h = functional.avg_pool2d(h, module.kernel_size, module.stride, module.padding)
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.AvgPool1d | nn.AvgPool2d):
            h = module(h)
    middle = [size // 2 for size in h.shape[2:]]
    h[(0, 0, *middle)].backward()
    for axis, (size, stride, offset) in enumerate(site.inputs.field):
        others = [other for other in range(x.dim()) if other != axis + 2]
        reached = x.grad.abs().sum(others).nonzero()[:, 0]
        first = middle[axis] * stride + offset
        assert int(reached.min()) == max(first, 0)
        assert int(reached.max()) == min(first + size - 1, x.shape[axis + 2] - 1)


def test_fields_are_followed_through_padding_and_cropping():
    """A causal stack that pads on both sides and crops what looks ahead, then pads by itself on one side."""

    def forward(self, x):
        h = functional.gelu(self.a(x)[..., :-4])
        h = functional.pad(self.b(functional.pad(h, (3, 0))), (1, 1), mode="reflect")[..., 2::2]
        return self.c(h)

    a = nn.Conv1d(1, 2, 3, dilation=2, padding=4, dtype=torch.float64)
    b, c = (nn.Conv1d(2, 2, size, dtype=torch.float64) for size in (4, 2))
    model = Free(forward, a=a, b=b, c=c)
    x = numbers(2, 1, 40).requires_grad_()
    shown = show(model, batch_of(x.detach()))
    assert shown.site("b").inputs.field == ((8, 1, -7),)
    ((size, stride, offset),) = shown.site("c").inputs.field
    model(x)[0, 0, 8].backward()
    reached = x.grad[0, 0].nonzero()[:, 0]
    assert (int(reached.min()), int(reached.max())) == (8 * stride + offset, 8 * stride + offset + size - 1)


def test_units_are_known_through_a_mask_of_padding():
    def forward(self, x, lengths):
        padding = torch.arange(x.shape[2]) >= lengths[:, None]
        return self.b(self.a(x).relu().masked_fill(padding[:, None], 0.0))

    model = Free(forward, a=nn.Conv1d(3, 4, 1), b=nn.Conv1d(4, 2, 3))
    shown = show(model, batch_of(torch.randn(3, 3, 6), torch.tensor([6, 4, 2])))
    assert upstream_of(shown, "b") == [("a", unit) for unit in range(4)]


def upstream_of(shown, name: str) -> list[tuple[str, int]]:
    space = shown.site(name).inputs
    return [(space.upstream[site], unit) for site, unit in space.upstream_unit]


def test_channels_keep_their_units_through_norms_pools_and_flattening(randomised):
    model = randomised(
        nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1),
            nn.BatchNorm2d(3),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(3, 4, 3, groups=1),
            nn.GroupNorm(2, 4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16, 5),
            nn.Tanh(),
            nn.Linear(5, 2),
        )
    ).eval()
    shown = show(model, batch_of(torch.randn(3, 1, 8, 8)))
    assert shown.site("0").inputs.kind == "pixels"
    assert shown.site("0").inputs.upstream == ()
    assert upstream_of(shown, "4") == [("0", unit) for unit in range(3)]
    assert upstream_of(shown, "8") == [("4", unit) for unit in range(4) for _ in range(4)]
    assert upstream_of(shown, "10") == [("8", unit) for unit in range(5)]
    assert shown.site("10").inputs.kind == "units"


def test_a_concatenation_names_both_its_sources_and_a_shuffle_their_order():
    def forward(self, x):
        h = torch.cat([self.a(x).relu(), self.b(x).relu()], 1)
        return self.c(h.view(len(x), 2, 2, -1).transpose(1, 2).flatten(1, 2))

    model = Free(
        forward,
        a=nn.Conv1d(2, 1, 1, dtype=torch.float64),
        b=nn.Conv1d(2, 3, 1, dtype=torch.float64),
        c=nn.Conv1d(4, 2, 1, dtype=torch.float64),
    )
    shown = show(model, batch_of(numbers(3, 2, 5)))
    assert upstream_of(shown, "c") == [("a", 0), ("b", 1), ("b", 0), ("b", 2)]


def test_a_residual_stream_has_no_units():
    def forward(self, x):
        h = self.enter(x)
        h = h + self.down(self.up(h).relu())
        return self.out(h)

    model = Free(forward, enter=linear(3, 4), up=linear(4, 6), down=linear(6, 4), out=linear(4, 2))
    shown = show(model, batch_of(numbers(5, 3)))
    assert upstream_of(shown, "up") == [("enter", unit) for unit in range(4)]
    assert upstream_of(shown, "down") == [("up", unit) for unit in range(6)]
    assert shown.site("out").inputs.upstream == ()


def test_the_product_of_a_gated_pair_is_its_unit():
    model = Free(
        lambda self, x: self.d(functional.silu(self.g(x)) * self.u(x)), g=linear(3, 4), u=linear(3, 4), d=linear(4, 2)
    )
    assert upstream_of(show(model, batch_of(numbers(5, 3))), "d") == [("g", unit) for unit in range(4)]


@pytest.mark.parametrize(
    ("shape", "kind"), [((4,), "features"), ((3, 4), "lags"), ((1, 4, 5), "pixels"), ((2, 3, 4, 2), "pixels")]
)
def test_a_flattened_input_keeps_its_shape(shape, kind):
    model = nn.Sequential(nn.Flatten(), nn.Linear(int(torch.Size(shape).numel()), 2))
    space = show(model, batch_of(torch.randn(3, *shape))).site("1").inputs
    assert (space.kind, space.shape) == (kind, shape)


def test_units_are_where_a_disturbance_arrives():
    """An oracle without shadows: adding to one unit's activation changes the inputs that name it, and no others."""
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.Hardtanh(-9, 9), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 4)
    ).double()
    x = numbers(2, 1, 6, 6)
    shown = show(model, batch_of(x))
    named = upstream_of(shown, "4")
    for unit in range(3):
        bias = model[0].bias.detach().clone()
        model[0].bias.data[unit] += 0.125
        other = show(model, batch_of(x))
        changed = (other.x["4"] != shown.x["4"]).any(0).flatten()
        assert changed.tolist() == [one == ("0", unit) for one in named]
        model[0].bias.data.copy_(bias)
