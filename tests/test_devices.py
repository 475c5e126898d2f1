"""Where models are measured: what a job without a GPU to be had is told, and what is moved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.batch import Batch
from pipeline.devices import CPU, GPU, device_asked, device_named, moved
from pipeline.errors import JobError
from pipeline.job import Resources
from pipeline.resolve import resolve
from pipeline.store import open_store
from tests.census import run_inline, small_job

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def test_a_run_that_asks_for_gpus_measures_there() -> None:
    assert device_asked(Resources()) == CPU
    assert device_asked(Resources(gpus_per_worker=0.25)) == GPU


@WITHOUT_GPU
def test_a_gpu_that_is_not_there_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"gpus_per_worker asks for a GPU, and torch \S+ sees none on .*set it to 0"):
        device_named(GPU)
    job = small_job(tmp_path, more="[resources]\ngpus_per_worker = 1\n")
    url = str(tmp_path / "census")
    store = open_store(url)
    with pytest.raises(JobError, match="gpus_per_worker"):
        run_inline(job, url)
    assert resolve(job, store).device == GPU
    assert not store.keys("states/")


def test_a_batch_is_read_in_the_model_s_precision_and_keeps_its_names() -> None:
    batch = Batch(
        inputs=(torch.ones(2, 3), [torch.ones(2, dtype=torch.int64)]),
        uid_N=torch.tensor([5, 7]),
        label_N=torch.tensor([1, -1]),
        kwargs={"mask": torch.ones(2, dtype=torch.bool)},
    )
    there = moved(batch, torch.device("cpu"), torch.bfloat16)
    assert (there.inputs[0].dtype, there.inputs[1][0].dtype) == (torch.bfloat16, torch.int64)
    assert there.kwargs["mask"].dtype == torch.bool
    assert there.label_N is batch.label_N
    assert there.uid_N is batch.uid_N


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_a_job_measures_in_its_precision(tmp_path: Path, dtype: str) -> None:
    job = small_job(tmp_path)
    job = job.model_copy(update={"numerics": job.numerics.model_copy(update={"dtype": dtype})})
    outcome, _ = run_inline(job, str(tmp_path / "census"))
    assert not outcome.failed
