"""What the statistics of a model are said to cost, where it is known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline import cost
from pipeline.batch import Batch
from pipeline.cost import cost_beside


def test_a_small_last_batch_counts_by_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "_seconds", lambda work, batch: work() or 0.5)
    batch = Batch((torch.ones(256, 3),), torch.arange(256))
    # a whole batch in a second, and twelve rows in as much time as they take of it
    found = cost_beside(nn.Linear(3, 2), batch, seconds=1 + 12 / 256, rows=268)
    assert (found.rows, found.forward, found.passes) == (256, 0.5, 1)
    assert found.measured == pytest.approx(1)
    assert found.ratio == pytest.approx(2)


def test_short_forwards_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    took = iter([0.9, 0.1, 0.1, 0.1, 0.1])
    monkeypatch.setattr(cost, "FEW_S", 1.25)
    monkeypatch.setattr(cost, "_seconds", lambda work, batch: work() or next(took))
    found = cost_beside(nn.Linear(3, 2), Batch((torch.ones(8, 3),), torch.arange(8)), seconds=1.0, rows=8)
    assert (found.forward, found.passes) == (0.1, 5)
