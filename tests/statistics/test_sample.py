"""A statistic of a sample of rows: exactly that of the rows whose hash is small, whatever batches they come in."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from pipeline.batch import Batch
from pipeline.measure import measure
from pipeline.registry import statistics
from pipeline.resolve import sampled
from tests.statistics.recompute.raw import splitmix

SEED, ROWS, CLASSES = 0x5EED, 200, 3
SAMPLED = sorted(name for name, one in statistics().items() if one.sample_rows is not None)


def in_sample(uid: int, shift: int) -> bool:
    return splitmix(splitmix(splitmix(SEED)) ^ uid) < 1 << (63 - shift)


def batches(x: torch.Tensor, uid: torch.Tensor, label: torch.Tensor, rows: int) -> list[Batch]:
    return [Batch((a,), b, c) for a, b, c in zip(x.split(rows), uid.split(rows), label.split(rows), strict=True)]


@pytest.mark.parametrize("name", SAMPLED)
def test_it_is_that_of_the_rows_with_small_hashes(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, CLASSES)).double()
    x, uid = torch.randn(ROWS, 6).double(), torch.randint(1 << 62, (ROWS,))
    label = torch.randint(CLASSES, (ROWS,))
    keep = torch.tensor([in_sample(one, 2) for one in uid.tolist()])
    assert 0.1 * ROWS < keep.sum() < 0.4 * ROWS
    statistic = statistics()[name]
    found = measure(model, batches(x, uid, label, 7), statistics=[replace(statistic, sample_shift=2)], classes=CLASSES)
    wanted = measure(model, batches(x[keep], uid[keep], label[keep], ROWS), statistics=[statistic], classes=CLASSES)
    assert found.keys() == wanted.keys()
    for table in found.keys() - {"sites"}:
        left, right = (one[table].to_pydict() for one in (found, wanted))
        for column in left:
            for ours, theirs in zip(left[column], right[column], strict=True):
                exact = ours is None or theirs is None or isinstance(theirs, str | bool)
                near = theirs if exact else pytest.approx(theirs, rel=1e-5, abs=1e-9, nan_ok=True)
                assert ours == near, (table, column)


def test_a_sample_holds_about_what_is_asked_for() -> None:
    statistic = statistics()["template"]
    assert statistic.sample_rows == 20_000
    for rows in (1, 40_000, 40_001, 10**6, 10**9):
        expected = rows >> sampled(statistic, rows).sample_shift
        assert expected <= 40_000
        assert rows <= 40_000 or expected >= 20_000
