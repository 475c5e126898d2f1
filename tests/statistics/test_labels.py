"""labels where a row's greatest output, or its drawn label, is not what it seems."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.errors import JobError
from pipeline.measure import measure
from pipeline.registry import statistics
from pipeline.resolve import resolve
from pipeline.store import open_store
from tests.census import small_job


class Pair(nn.Module):
    """A gated pair with a gate that is never negative, and the same gate by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.paired, self.glu, self.alone = nn.Linear(4, 12), nn.GLU(), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.alone(self.glu(self.paired(x))).sigmoid()


def test_the_selectivity_of_a_pair_is_null_as_its_other_branch_has_either_sign() -> None:
    torch.manual_seed(0)
    x, label_N = torch.randn(60, 4), torch.arange(60) % 3
    tables = measure(Pair(), [(x, label_N)], classes=3)
    gates = dict(zip(tables["sites"]["site"].to_pylist(), tables["sites"]["gate"].to_pylist(), strict=True))
    assert gates == {"paired": "glu", "alone": "sigmoid"}
    for row in tables["neurons"].to_pylist():
        assert (row["class_selectivity"] is None) == (row["site"] == "paired")
        assert (row["class_selectivity_null"] is None) == (row["site"] == "paired")
        assert row["class_information"] is not None


def test_a_prior_for_other_classes_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    job = small_job(tmp_path, more="[statistics.labels]\nprior = [1, 2]")
    store = open_store(str(tmp_path / "store"))
    wrong = r"\[statistics.labels\] prior = \[1, 2\]: expected (\d+) weights, one for each class of the data '\w+'"
    with pytest.raises(JobError, match=rf"job.toml:\d+: {wrong}") as refused:
        resolve(job, store)
    assert not store.keys("")
    (classes,) = (int(word) for word in str(refused.value).split() if word.isdigit())
    (tmp_path / "right").mkdir()
    right = small_job(tmp_path / "right", more=f"[statistics.labels]\nprior = {[3] * classes}")
    assert resolve(right, open_store(str(tmp_path / "right" / "store"))).statistics[0].name == "labels"


def test_a_prior_for_other_classes_is_refused_in_a_notebook_before_any_batch() -> None:
    labels = replace(statistics()["labels"], prior=(1, 2))
    with pytest.raises(JobError, match=r"statistics.labels.prior = \(1, 2\): expected 3 weights"):
        measure(Pair(), iter([(torch.randn(6, 4), torch.arange(6) % 3)]), classes=3, statistics=[labels])
    tables = measure(Pair(), [torch.randn(6, 4)], statistics=[labels])
    assert "classes" not in tables or tables["classes"].num_rows == 0
