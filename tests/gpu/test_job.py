"""A whole job on a GPU, from training to committed tables, beside the same models measured on the CPU."""

from __future__ import annotations

import io
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.store import Store
from pipeline.verify import verify_runs
from tests.census import CNN, run_inline, small_job

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]
ON_GPU = "[resources]\ngpus_per_worker = 1\n"


def table(store: Store, run: str, name: str) -> pd.DataFrame:
    parts = [store.get(key) for key in store.keys(f"runs/{run}/tables/{name}/")]
    return pd.concat([pq.read_table(io.BytesIO(part)).to_pandas() for part in parts], ignore_index=True)


def test_a_job_on_a_gpu_is_that_on_the_cpu_to_the_rounding_of_its_forward(tmp_path: Path) -> None:
    store = str(tmp_path / "census")
    there, found = run_inline(small_job(tmp_path, seeds="0, 1", more=CNN + ON_GPU), store)
    # the models are those that the GPU has trained
    here, _ = run_inline(small_job(tmp_path, seeds="0, 1", more=CNN), store)
    assert not there.failed
    assert not here.failed
    assert all(not one.problems for one in verify_runs(found, deep=True))
    names = set(table(found, there.run, "receipts")["device"])
    assert names == {f"cuda: {torch.cuda.get_device_name()}"}
    keys = ["model", "split", "site", "unit"]
    mine, yours = (table(found, one.run, "neurons").set_index(keys).sort_index() for one in (there, here))
    assert mine.index.equals(yours.index)
    for name in ("n", "n_nonfinite", "template_n", "weight_norm", "bias"):
        pd.testing.assert_series_equal(mine[name], yours[name])
    for name in ("z_mean", "z_std", "z_min", "z_max", "a_mean", "template_cos"):
        pd.testing.assert_series_equal(mine[name], yours[name], rtol=1e-3, atol=1e-4)
    pd.testing.assert_series_equal(mine["fire_rate"], yours["fire_rate"], rtol=0, atol=0.01)


def test_a_job_on_a_gpu_gives_the_same_states_twice(tmp_path: Path) -> None:
    job = small_job(tmp_path, more=CNN + ON_GPU)
    (one, first), (two, second) = (run_inline(job, str(tmp_path / name)) for name in ("one", "two"))
    assert one.run == two.run
    keys = sorted([*first.keys("models/"), *first.keys("states/")])
    assert sorted([*second.keys("models/"), *second.keys("states/")]) == keys
    for key in keys:
        assert first.get(key) == second.get(key), key
