"""importance against real ablations, and its two identities."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from pipeline.batch import Batch
from pipeline.flow.discover import discover
from pipeline.measure import measure
from pipeline.sites import Presentations
from pipeline.statistics.importance import STATISTIC
from tests.laws.drawn import make_presentations, make_site

Edit = Callable[[torch.Tensor], torch.Tensor]


class Net(nn.Module):
    """Two gated layers, convolutional and dense, whose activations can be edited."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.hidden, self.out = nn.Conv2d(1, 4, 3), nn.Linear(4 * 36, 10), nn.Linear(10, 3)
        self.edits: dict[str, Edit] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self._edited("conv", functional.relu(self.conv(x)))
        h = self._edited("hidden", functional.gelu(self.hidden(h.flatten(1))))
        return self.out(h)

    def _edited(self, name: str, a: torch.Tensor) -> torch.Tensor:
        return self.edits.get(name, lambda value: value)(a)


@pytest.fixture(scope="module")
def trained() -> tuple[Net, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(200, 1, 8, 8).double()
    label = (x[:, 0, :4].sum((1, 2)) > 0).long() + (x[:, 0, 4:].sum((1, 2)) > 0).long()
    net = Net().double()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        functional.cross_entropy(net(x), label).backward()
        optimizer.step()
    return net.eval(), x, label


def loss_of(net: Net, x: torch.Tensor, label: torch.Tensor, name: str, edit: Edit) -> float:
    net.edits = {name: edit}
    with torch.no_grad():
        loss = float(functional.cross_entropy(net(x), label))
    net.edits = {}
    return loss


def measured(net: Net, x: torch.Tensor, label: torch.Tensor, batch_rows: int = 64) -> dict[str, dict[str, np.ndarray]]:
    batches = list(zip(x.split(batch_rows), label.split(batch_rows), strict=True))
    table = measure(net, batches, statistics=[STATISTIC], classes=3)["neurons"].to_pandas()
    return {site: rows.sort_values("unit") for site, rows in table.groupby("site")}


@pytest.mark.parametrize("name", ["conv", "hidden"])
@pytest.mark.parametrize("column", ["importance_mean_ablation", "importance_zero_ablation"])
def test_it_is_the_slope_of_a_real_ablation(
    trained: tuple[Net, torch.Tensor, torch.Tensor], name: str, column: str
) -> None:
    net, x, label = trained
    got = measured(net, x, label)[name][column].to_numpy()
    step = 1e-5
    for unit in range(len(got)):

        def ablated(a: torch.Tensor, share: float, unit: int = unit) -> torch.Tensor:
            a = a.clone()
            target = a[:, unit].mean() if column == "importance_mean_ablation" else 0.0
            a[:, unit] += share * (target - a[:, unit])
            return a

        up, down = (loss_of(net, x, label, name, lambda a, s=s: ablated(a, s)) for s in (step, -step))
        assert got[unit] == pytest.approx((up - down) / (2 * step), rel=1e-5, abs=1e-8)


def test_it_ranks_units_as_whole_ablations_do(trained: tuple[Net, torch.Tensor, torch.Tensor]) -> None:
    net, x, label = trained
    got = measured(net, x, label)["hidden"]["importance_mean_ablation"].to_numpy()
    base = loss_of(net, x, label, "hidden", lambda a: a)

    def held(a: torch.Tensor, unit: int) -> torch.Tensor:
        a = a.clone()
        a[:, unit] = a[:, unit].mean()
        return a

    real = [loss_of(net, x, label, "hidden", lambda a, unit=unit: held(a, unit)) - base for unit in range(10)]
    ranks = [np.argsort(np.argsort(values)) for values in (got, np.array(real))]
    assert np.corrcoef(*ranks)[0, 1] > 0.7


def test_batches_do_not_matter(trained: tuple[Net, torch.Tensor, torch.Tensor]) -> None:
    net, x, label = trained
    one, many = measured(net, x, label, 200), measured(net, x, label, 7)
    for name in one:
        for column in ("importance_rows", "importance_mean_ablation", "importance_zero_ablation"):
            np.testing.assert_allclose(many[name][column], one[name][column], rtol=1e-9, atol=1e-12)


def test_the_two_identities() -> None:
    generator = torch.Generator().manual_seed(0)
    shown = make_presentations(
        make_site(torch.randn(3, 4, generator=generator)), torch.randn(50, 2, 1, 4, generator=generator)
    )
    gradient_LSU = torch.randn(50, 2, 3, generator=generator)
    a, g = shown.a_LSU.flatten(0, 1).double(), gradient_LSU.flatten(0, 1).double()
    got = _columns(shown, gradient_LSU)
    cov = torch.stack([torch.cov(torch.stack([a[:, u], g[:, u]]), correction=0)[0, 1] for u in range(3)])
    torch.testing.assert_close(got["importance_mean_ablation"], -2 * cov)
    torch.testing.assert_close(got["importance_zero_ablation"], -2 * (a * g).mean(0))


def _columns(shown: Presentations, gradient_LSU: torch.Tensor) -> dict[str, torch.Tensor]:
    from dataclasses import replace

    from pipeline.statistics.base import Controls

    state = STATISTIC.observe(replace(shown, gradient_LSU=gradient_LSU))
    return dict(STATISTIC.columns(shown.site, state, Controls())["neurons"])  # type: ignore[arg-type]


def test_without_labels_it_is_null_not_nan() -> None:
    net = Net().eval()
    table = measure(net, [torch.randn(5, 1, 8, 8)], statistics=[STATISTIC])["neurons"]
    assert table["importance_rows"].to_pylist() == [0] * 17
    assert table["importance_mean_ablation"].null_count == 17


def test_the_loss_of_a_site_that_leads_nowhere_is_indifferent() -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            functional.relu(self.unused(x))
            return self.used(x)

    net = Aside().eval()
    batch = Batch(inputs=(torch.randn(6, 4),), uid_N=torch.arange(6), label_N=torch.zeros(6, dtype=torch.int64))
    assert {site.name for site in discover(net, batch).sites} == {"used", "unused"}
    table = measure(net, [batch], statistics=[STATISTIC], classes=3)["neurons"].to_pandas()
    assert (table[table.site == "unused"]["importance_mean_ablation"] == 0).all()
