"""The models that are measured, each with a few batches of made-up rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import nn

from pipeline.batch import Batch
from pipeline.hashing import row_hash
from pipeline.models.base import Task
from pipeline.registry import families
from pipeline.samples import SAMPLE_SEED

BATCHES = 4
# a data set of this many rows decides the samples that some statistics are computed on
DATA_ROWS = 1_000_000


@dataclass(frozen=True)
class Case:
    """A family's model of some size, its task, and the rows of a batch.

    times  measured on batches of so many times the rows: a job takes 256 rows unless it says otherwise
    """

    name: str
    family: str
    task: Task
    rows: int
    hyperparameters: dict[str, Any]
    edges: int = 0
    times: tuple[int, ...] = (1,)


CASES = (
    Case(
        "resnet-18",
        "resnet",
        Task((3, 32, 32), 10),
        64,
        {"depth": 18, "widths": (64, 128, 256, 512), "shortcut": "B"},
    ),
    Case(
        "transformer-6x384",
        "transformer",
        Task((128,), 10, vocabulary=256),
        16,
        {"width": 384, "heads": 6},
        times=(1, 4),
    ),
    Case("mlp-1024-1024", "mlp", Task((784,), 10), 256, {"widths": (1024, 1024)}),
    Case("tcn-8x64", "tcn", Task((12, 256), 10), 32, {"widths": (64,) * 8, "kernel": 3}),
    Case("gcn-256", "gcn", Task((1433,), 7), 2708, {"widths": (256,)}, edges=10_556),
    Case("deepfm", "deepfm", Task((13,), 2, categories=(1000,) * 26), 1024, {}),
)


def larger(case: Case, times: int) -> Case:
    """The same model with so many times the rows (nodes and edges) of a batch."""
    return replace(case, rows=case.rows * times, edges=case.edges * times)


def build(case: Case) -> nn.Module:
    """The model, untrained, in eval mode."""
    family = families()[case.family]
    torch.manual_seed(0)
    return family.build(family.parameters(**case.hyperparameters), case.task).eval()  # type: ignore[no-any-return]


def batches(case: Case) -> list[Batch]:
    """Batches of different rows, no row in the sample of statistics of some rows."""
    family = families()[case.family]
    torch.manual_seed(1)
    made = []
    for number in range(BATCHES):
        inputs = family.example(case.task, case.rows, torch.float32)
        if case.edges:
            inputs = (inputs[0], torch.randint(case.rows, (2, case.edges)))
        label_N = torch.randint(case.task.outputs, (case.rows,))
        made.append(Batch(inputs, torch.arange(case.rows) + number * case.rows, label_N))
    return made


def in_sample(several: Sequence[Batch], shift: int, *, wanted: int | None = None) -> list[Batch]:
    """The batches with other uids, `wanted` of each in the sample: if not given as many as expected, at least one."""
    wanted = wanted or max(1, several[0].rows >> shift)
    inside, outside = _named(shift)
    made = []
    for number, batch in enumerate(several):
        rest = batch.rows - wanted
        uid_N = torch.cat([inside[number * wanted :][:wanted], outside[number * rest :][:rest]])
        order = torch.randperm(batch.rows, generator=torch.Generator().manual_seed(number))
        made.append(replace(batch, uid_N=uid_N[order]))
    return made


@cache
def _named(shift: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Uids of rows that are in the sample, and of rows that are not."""
    pool_N = torch.arange(1 << 23)
    in_N = (
        row_hash(pool_N, seed=SAMPLE_SEED) >> (63 - shift) == 0 if shift else torch.ones_like(pool_N, dtype=torch.bool)
    )
    return pool_N[in_N], pool_N[~in_N]
