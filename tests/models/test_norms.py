"""BatchNorm statistics taken from data: those of all values, however they came in batches."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.batch import Batch
from pipeline.errors import ModelError
from pipeline.foreign.untrained import untrained
from pipeline.models.norms import reestimated


def batches(x: torch.Tensor, sizes: list[int]) -> list[Batch]:
    return [Batch((part,), torch.arange(len(part))) for part in x.split(sizes)]


@pytest.mark.parametrize("shape", [(4,), (4, 5), (4, 3, 3)])
def test_uneven_batches_count_by_their_size(shape: tuple[int, ...]) -> None:
    # an average of batches gives a last one of a single row the weight of 40
    x = torch.randn(81, *shape, generator=torch.Generator().manual_seed(0)) * 3 + torch.arange(81.0).view(
        -1, *[1] * len(shape)
    )
    kind = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d}[len(shape)]
    norm = reestimated(kind(4), batches(x, [40, 40, 1]), rows=4096)
    values = x.movedim(1, -1).reshape(-1, 4).double()
    torch.testing.assert_close(norm.running_mean.double(), values.mean(0))
    torch.testing.assert_close(norm.running_var.double(), values.var(0))
    assert not norm.training


def test_a_norm_behind_others_settles_near_what_they_give_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5), nn.BatchNorm1d(5))
    x = torch.randn(2000, 3) + 4
    reestimated(model, batches(x, [50] * 40), rows=4096)
    with torch.no_grad():
        given = model[:4](x)
        out = model(x)
    torch.testing.assert_close(model[4].running_mean, given.mean(0), atol=0.05, rtol=0.05)
    torch.testing.assert_close(out.var(0), torch.ones(5), atol=0.1, rtol=0)


def test_rows_beyond_the_limit_and_models_without_norms_are_left_alone() -> None:
    x = torch.cat([torch.zeros(10, 2), torch.full((10, 2), 9.0)])
    assert reestimated(nn.BatchNorm1d(2), batches(x, [10, 10]), rows=10).running_mean.tolist() == [0, 0]
    still = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False))
    assert reestimated(still, batches(x, [10, 10]), rows=99) is still


class Unset(nn.Module):
    """A weight of which nothing says how it begins."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3))


def test_a_twin_is_drawn_anew_by_its_constructor_or_there_is_none() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))

    x = torch.randn(21, 2, generator=torch.Generator().manual_seed(0)) + 5
    state = torch.get_rng_state()
    twins = [untrained(build, seed, batches(x, [20, 1])) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    weights = [twin[0].weight for twin in twins if twin is not None]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    with torch.no_grad():
        torch.testing.assert_close(twins[0][1].running_mean, twins[0][0](x).mean(0))
    assert untrained(Unset, 0) is None


def test_a_builder_of_lazy_modules_is_refused() -> None:
    with pytest.raises(ModelError, match=r"parameter 0.weight has no shape yet: a builder makes all weights"):
        untrained(lambda: nn.Sequential(nn.LazyLinear(3)), 0)
