"""Statistics of whole networks against raw activations that hooks and unfold give."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from pipeline.batch import Batch
from pipeline.flow.discover import discover
from pipeline.flow.tap import tapped_forward
from pipeline.kernels.thin import thinned
from pipeline.running import Running
from pipeline.sites import Presentations
from pipeline.statistics.base import Controls, Statistic
from pipeline.statistics.composition import STATISTIC as COMPOSITION
from pipeline.statistics.redundancy import STATISTIC as REDUNDANCY
from pipeline.statistics.template import STATISTIC as TEMPLATE


@pytest.fixture(scope="module")
def network() -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, 3, padding=2, dilation=2, groups=2), nn.GELU(), nn.Flatten(), nn.Linear(8 * 16, 5), nn.ReLU(),
        nn.Linear(5, 3),
    )  # fmt: skip
    with torch.no_grad():
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 2)
        model[1].weight.normal_()
    return model.eval(), torch.randn(90, 3, 8, 8) + 0.3


def state_of(statistic: Statistic, network: tuple[nn.Sequential, torch.Tensor], name: str) -> tuple[object, dict]:
    model, x = network
    batches = [
        Batch(inputs=(rows,), uid_N=uid) for rows, uid in zip(x.split(32), torch.arange(90).split(32), strict=True)
    ]
    running = Running(discover(model, batches[0]), [statistic])
    for batch in batches:
        running.add(model, batch)
    site = next(site for site in running.discovery.sites if site.name == name)
    return site, running.states()[statistic.name][name]


def raw(network: tuple[nn.Sequential, torch.Tensor], name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (P, G, D), z (P, U) and a (P, U) of a layer, in float64, from the layers themselves."""
    model, x = network
    layer, (before, after) = model[int(name)], {"0": (0, 2), "3": (3, 4), "6": (6, 7)}[name]
    with torch.no_grad():
        given = model[:before](x)
        z = model[:after](x)
        a = functional.relu(z) if name != "3" else functional.gelu(z)
    if isinstance(layer, nn.Conv2d):
        parts = [
            functional.unfold(group, 3, layer.dilation, layer.padding, layer.stride).transpose(1, 2).flatten(0, 1)
            for group in given.chunk(layer.groups, 1)
        ]
        z, a = (value.flatten(2).transpose(1, 2).flatten(0, 1) for value in (z, a))
        return torch.stack(parts, 1).double(), z.double(), a.double()
    return given[:, None].double(), z.double(), a.double()


@pytest.mark.parametrize("name", ["0", "3", "6"])
def test_the_covariance_with_the_inputs_is_that_of_raw_activations(
    network: tuple[nn.Sequential, torch.Tensor], name: str
) -> None:
    site, state = state_of(TEMPLATE, network, name)
    patterns = TEMPLATE.columns(site, state, Controls())["patterns"]
    x, z, a = raw(network, name)
    for unit in range(site.units):
        own = x[:, int(site.group_U[unit])]
        cov = ((a[:, unit] - a[:, unit].mean())[:, None] * (own - own.mean(0))).mean(0)
        assert (patterns["cov"][unit] - cov).norm() <= 1e-5 * cov.norm()
        sta = own[z[:, unit] > 0].mean(0) - own.mean(0)
        assert (patterns["sta"][unit] - sta).norm() <= 1e-4 * sta.norm()


@pytest.mark.parametrize("name", ["0", "3", "6"])
def test_contributions_add_up_to_the_model_s_own_rise_of_z(
    network: tuple[nn.Sequential, torch.Tensor], name: str
) -> None:
    site, state = state_of(COMPOSITION, network, name)
    total = COMPOSITION.columns(site, state, Controls())["neurons"]["composition_total"]
    _, z, _ = raw(network, name)
    rise = torch.stack([unit[unit > 0].mean() - unit.mean() for unit in z.T])
    torch.testing.assert_close(total, rise, atol=1e-5, rtol=1e-4)


def test_correlations_are_those_of_raw_activations(network: tuple[nn.Sequential, torch.Tensor]) -> None:
    site, state = state_of(REDUNDANCY, network, "3")
    neurons = REDUNDANCY.columns(site, state, Controls())["neurons"]
    _, _, a = raw(network, "3")
    r = torch.corrcoef(a.T).fill_diagonal_(0)
    torch.testing.assert_close(neurons["redundancy_r"].abs(), r.abs().amax(1), atol=1e-6, rtol=0)
    spectrum = torch.linalg.eigvalsh(torch.cov(a.T))
    dimension = spectrum.sum() ** 2 / spectrum.square().sum()
    torch.testing.assert_close(neurons["redundancy_dimension"][0], dimension, atol=0, rtol=1e-5)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 6, 3, padding=1, groups=2),
        nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(0, 1)),
        nn.Conv3d(2, 4, 2, dilation=2),
        nn.ConvTranspose2d(3, 4, 3, stride=2),
        nn.Linear(7, 5),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_the_inputs_at_chosen_positions_are_those_of_all_positions(layer: nn.Module) -> None:
    shape = {"Linear": (9, 12, 7), "Conv1d": (9, 4, 12), "Conv2d": (9, 3, 9, 8), "Conv3d": (9, 2, 5, 5, 6)}
    batch = Batch(inputs=(torch.randn(shape.get(type(layer).__name__, (9, 3, 5, 5))),), uid_N=torch.arange(9))
    seen: list[Presentations] = []
    with torch.inference_mode():
        tapped_forward(layer, discover(layer, batch), batch, seen.append)
        for shown in (seen[0], seen[0].select_rows(torch.arange(9) % 3 != 1)):
            sample = thinned(shown, 4)
            assert sample.position_LS is not None
            index = sample.position_LS if shown.position_LS is None else None
            picked = sample.patches(0, sample.entries)
            whole = shown.patches(0, shown.entries)
            if index is not None:
                assert torch.equal(picked, whole.take_along_dim(index[..., None, None], 1))
            # the inputs at a position are those of its own z
            z_LSU = (
                torch.einsum(
                    "lsgd,gud->lsgu",
                    picked.double(),
                    shown.site.pattern_UD.view(shown.site.groups, -1, shown.site.fan_in),
                ).flatten(2)
                + shown.site.bias_U
            )
            torch.testing.assert_close(z_LSU, sample.z_LSU.double(), atol=1e-5, rtol=1e-4)
