"""Rows held back and run together: only of models that make the same of a row anywhere, and then only those rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.batch import Batch
from pipeline.flow.apart import Held, cut
from pipeline.flow.discover import discover
from pipeline.measure import measure
from pipeline.registry import statistics
from pipeline.running import Running
from pipeline.samples import in_sample
from pipeline.statistics.response import STATISTIC as RESPONSE

CLASSES = 3


class Mixing(nn.Sequential):
    """Each row less the mean of the batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x - x.mean(0))


class Remembering(nn.Module):
    """Adds what it was shown before."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, CLASSES)
        self.before = torch.zeros(())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.layer(x) + 0 * self.before
        self.before = out.mean()
        return out


class Padded(nn.Module):
    """Rows along the second axis, with a mask and a scale that are arguments by name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 8), nn.Linear(8, CLASSES)

    def forward(self, x_SND: torch.Tensor, *, mask: torch.Tensor, scale: float) -> torch.Tensor:
        h_SND = self.layer(x_SND * scale).relu() * mask.T[..., None]
        return self.head(h_SND.mean(0))


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, CLASSES))


def padded(rows: int, positions: int, first: int = 0) -> Batch:
    mask_NS = torch.rand(rows, positions) > 0.3
    kwargs = {"mask": mask_NS, "scale": 2.0}
    return Batch(
        (torch.randn(positions, rows, 4),), torch.arange(first, first + rows), torch.randint(CLASSES, (rows,)),
        kwargs=kwargs, mask_NS=mask_NS,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("model", "shape", "apart"),
    [
        (plain(), (6,), True),
        (nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3)), (2, 6, 6), True),
        (nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 2)), (7, 8), True),
        (nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 3)), (6,), False),
        (Mixing(nn.Linear(6, 5), nn.Linear(5, 3)), (6,), False),
        (Remembering(), (6,), False),
    ],
    ids=["dense", "convolution", "attention", "norm over the batch", "mean of the batch", "state"],
)  # fmt: skip
def test_it_is_seen_whether_a_row_can_stand_alone(model: nn.Module, shape: tuple[int, ...], apart: bool) -> None:
    batch = Batch((torch.randn(6, *shape),), torch.arange(6))
    assert discover(model, batch).apart is apart


def test_one_row_says_nothing_of_others() -> None:
    assert not discover(plain(), Batch((torch.randn(1, 6),), torch.arange(1))).apart


def test_rows_are_cut_along_the_axis_that_has_them() -> None:
    batch = padded(5, 7)
    found = discover(Padded(), batch)
    assert found.apart
    keep_N = torch.tensor([False, True, False, True, True])
    part = cut(batch, keep_N, found.leaf_axes)
    assert part is not None
    assert torch.equal(part.inputs[0], batch.inputs[0][:, keep_N])
    assert torch.equal(part.kwargs["mask"], batch.kwargs["mask"][keep_N])
    for name in ("uid_N", "label_N", "mask_NS"):
        assert torch.equal(getattr(part, name), getattr(batch, name)[keep_N])
    assert cut(replace(batch, kwargs={**batch.kwargs, "table": torch.ones(3)}), keep_N, found.leaf_axes) is None
    assert cut(replace(batch, kwargs={**batch.kwargs, "graph": object()}), keep_N, found.leaf_axes) is None


def test_rows_wait_for_a_batch_and_only_beside_their_like() -> None:
    axes = discover(Padded(), padded(5, 7)).leaf_axes
    held, due = Held(axes), []
    for rows, positions, first in ((2, 7, 0), (1, 7, 2), (2, 7, 3), (2, 6, 5), (1, 6, 7)):
        due += held.add(padded(rows, positions, first), most=4)
    other = padded(1, 6, 8)
    due += held.add(replace(other, kwargs={**other.kwargs, "scale": 3.0}), most=4)
    due += held.rest()
    assert [batch.uid_N.tolist() for batch in due] == [[0, 1, 2], [3, 4], [5, 6, 7], [8]]
    assert [tuple(batch.inputs[0].shape) for batch in due] == [(7, 3, 4), (7, 2, 4), (6, 3, 4), (6, 1, 4)]
    assert held.rows == 0


def rows_run(model: nn.Module, batches: list[Batch], shift: int) -> tuple[int, int]:
    """How many rows the first layer was shown in all, and how many are in the sample."""
    chosen = [replace(one, sample_shift=shift if one.sample_rows else 0) for one in statistics().values()]
    running = Running(discover(model, batches[0]), chosen, CLASSES)
    seen: list[int] = []
    layer = next(module for module in model.modules() if isinstance(module, nn.Linear))
    handle = layer.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    for batch in batches:
        running.add(model, batch)
    running.finish(model)
    handle.remove()
    return sum(seen), int(running.states()["redundancy"]["0"]["pairs.n_1"])


def of_64(number: int) -> Batch:
    return Batch((torch.randn(64, 6),), torch.arange(64) + 64 * number, torch.randint(CLASSES, (64,)))


def test_only_rows_of_the_sample_are_run_again() -> None:
    batches = [of_64(number) for number in range(8)]
    seen, sampled = rows_run(plain(), batches, 3)
    assert 20 < sampled < 120
    # once without and once with gradients
    assert seen == 512 + 2 * sampled
    mixed, as_many = rows_run(Mixing(*plain()), batches, 3)
    assert as_many == sampled
    assert mixed == 2 * 512


def test_rows_of_one_batch_where_they_must_stay_there() -> None:
    model = Mixing(*plain()).double()
    x = torch.randn(90, 6).double()
    statistic = replace(RESPONSE, sample_shift=1)
    chosen = Running(discover(model, Batch((x,), torch.arange(90))), [statistic])
    found = measure(model, [x[:50], x[50:]], statistics=[statistic])["neurons"].to_pandas()
    keep = in_sample(torch.arange(90), 1)
    z = torch.cat([model[0](part - part.mean(0)) for part in (x[:50], x[50:])])[keep].detach().numpy()
    assert not chosen.discovery.apart
    found = found[found.site == "0"].sort_values("unit")
    np.testing.assert_allclose(found["z_mean"], z.mean(0), rtol=1e-12)
    assert (found["n"] == len(z)).all()


def test_states_are_not_given_while_rows_wait() -> None:
    model, batch = plain(), of_64(0)
    running = Running(discover(model, batch), [replace(statistics()["template"], sample_shift=1)], CLASSES)
    running.add(model, batch)
    with pytest.raises(RuntimeError, match="rows are held back"):
        running.states()
    running.finish(model)
    assert int(running.states()["template"]["0"]["comoment.n_U"][0]) > 0


def test_batches_of_other_lengths_and_a_last_one_of_one_row() -> None:
    model: Any = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 2)).eval()
    lengths = (5, 7, 7, 5, 9, 3)
    batches = [torch.randn(1 if length == 3 else 16, length, 8) for length in lengths]
    statistic = replace(statistics()["template"], sample_shift=1, whitened_fan_in=0)
    found = measure(model, batches, statistics=[statistic])["neurons"].to_pandas()
    rows = 16 * 5 + 1
    per_row = np.repeat(lengths, [len(batch) for batch in batches])
    assert (found["template_n"] == per_row[in_sample(torch.arange(rows), 1).numpy()].sum()).all()
