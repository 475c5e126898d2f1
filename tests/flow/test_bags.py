"""Sums of embeddings against dense multi-hot vectors: ragged, weighted and averaged bags, accumulators of a game."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.flow.models import Free, linear, numbers, weight
from tests.flow.shown import batch_of, show

VALUES = 9


def multi_hot(bags: list[list[int]], weights: list[list[float]] | None = None, *, mean: bool = False) -> torch.Tensor:
    x = torch.zeros(len(bags), VALUES, dtype=torch.float64)
    for row, bag in enumerate(bags):
        for place, value in enumerate(bag):
            x[row, value] += weights[row][place] if weights else 1.0 / (len(bag) if mean else 1)
    return x


def flat(bags: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    sizes = torch.tensor([0, *[len(bag) for bag in bags]])
    return torch.tensor([value for bag in bags for value in bag]), sizes.cumsum(0)


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("last", [False, True])
def test_ragged_bags_are_multi_hot_vectors(mode, last):
    bags = [[1, 4, 4], [0], [], [8, 2], [5, 6, 7, 1]]
    table = nn.EmbeddingBag(VALUES, 4, mode=mode, include_last_offset=last, dtype=torch.float64)
    model = Free(lambda self, index, offsets: torch.clamp(self.t(index, offsets) + self.b, 0, 1), t=table, b=weight(4))
    index, ends = flat(bags)
    shown = show(model, batch_of(index, ends if last else ends[:-1], rows=5))
    site = shown.site("t")
    assert (site.kind, site.gate, site.inputs.kind) == ("embedding_bag", "clamp", "values")
    torch.testing.assert_close(shown.x["t"][:, 0, 0], multi_hot(bags, mean=mode == "mean"))
    torch.testing.assert_close(site.pattern_UD, table.weight.T.detach())
    torch.testing.assert_close(shown.a["t"][:, 0], shown.out)
    assert shown.last["t"].row_L is None
    assert shown.discovery.unread == ()


def test_bags_of_one_length_with_weights_and_padding():
    table = nn.EmbeddingBag(VALUES, 4, mode="sum", padding_idx=0, dtype=torch.float64)
    model = Free(lambda self, index, weights: self.t(index, per_sample_weights=weights).relu(), t=table)
    index, weights = torch.tensor([[1, 0, 2], [3, 3, 8], [0, 0, 4], [5, 6, 7]]), numbers(4, 3)
    shown = show(model, batch_of(index, weights))
    expected = multi_hot(index.tolist(), weights.tolist())
    expected[:, 0] = 0
    torch.testing.assert_close(shown.x["t"][:, 0, 0], expected)
    torch.testing.assert_close(shown.z["t"][:, 0], expected @ table.weight.detach())
    assert shown.last["t"].row_L is None


def test_two_accumulators_of_one_table_feed_an_evaluation():
    def forward(self, mine, mine_at, theirs, theirs_at):
        halves = [self.t(index, offsets) for index, offsets in ((mine, mine_at), (theirs, theirs_at))]
        return self.out(torch.clamp(torch.cat(halves, 1), 0.0, 1.0))

    model = Free(forward, t=nn.EmbeddingBag(VALUES, 4, mode="sum", dtype=torch.float64), out=linear(8, 1))
    mine, theirs = [[1, 2], [3], [4, 5, 6]], [[7], [8, 8], [0, 1]]
    (index, ends), (other, other_ends) = flat(mine), flat(theirs)
    shown = show(model, batch_of(index, ends[:-1], other, other_ends[:-1], rows=3))
    assert [(site.name, site.gate) for site in shown.discovery.sites] == [
        ("t", "clamp"),
        ("t#1", "clamp"),
        ("out", "identity"),
    ]
    torch.testing.assert_close(shown.x["t#1"][:, 0, 0], multi_hot(theirs))
    torch.testing.assert_close(shown.x["out"][:, 0, 0], torch.cat([shown.a["t"], shown.a["t#1"]], -1)[:, 0])


def test_greatest_embeddings_are_no_sum():
    model = Free(lambda self, index: self.t(index), t=nn.EmbeddingBag(VALUES, 4, mode="max"))
    shown = show(model, batch_of(torch.randint(VALUES, (5, 3))))
    assert shown.discovery.sites == ()
    assert "looked up" in shown.discovery.unread[0].reason
