"""Where models are trained and measured: what a job without a GPU to be had is told, and what is moved."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

from pipeline import cost, devices, loading, task, training
from pipeline.batch import Batch
from pipeline.cli import cli
from pipeline.devices import CPU, GPU, device_asked, device_named, expect_gpus, moved
from pipeline.errors import JobError
from pipeline.fit.loop import Saved, fit
from pipeline.fit.recipe import Recipe
from pipeline.flow.discover import discover
from pipeline.job_sections import Resources
from pipeline.kernels import choose, native_build, triton_build
from pipeline.measuring import run as measuring
from pipeline.measuring.run import Measured
from pipeline.measuring.task import MeasureTask
from pipeline.models.base import Checkpoint, decode_checkpoint, encode_checkpoint
from pipeline.registry import families, statistics
from pipeline.resolve import resolve
from pipeline.running import Running
from pipeline.store import Store, open_store
from pipeline.training import TrainTask
from tests.census import published, run_inline, small_job, write_job
from tests.elsewhere import ELSEWHERE, elsewhere
from tests.fit.data import portions, recipe
from tests.kernels.test_bulk import in_bulk
from tests.laws.laws import assert_same_bits
from tests.models.build import EXAMPLES, build, disturbed, forward_inputs

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def test_a_run_that_asks_for_gpus_works_there() -> None:
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
    assert not store.keys("models/")
    assert not store.keys("states/")


@WITHOUT_GPU
@pytest.mark.parametrize("ray", ["none", "local"])
def test_a_command_that_asks_for_a_gpu_in_vain_writes_nothing(tmp_path: Path, ray: str) -> None:
    job = write_job(tmp_path / "job.toml", more="[resources]\ngpus_per_worker = 0.5\n")
    store = tmp_path / "census"
    said = CliRunner().invoke(cli, ["run", str(job), "--store", str(store), "--ray", ray])
    assert said.exit_code == 2
    assert "error: resources.gpus_per_worker asks for a GPU, and torch" in said.stderr
    assert not store.exists()


def test_a_machine_with_too_few_gpus_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    expect_gpus(Resources())
    monkeypatch.setattr(devices, "device_named", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    expect_gpus(Resources(gpus_per_worker=2))
    with pytest.raises(JobError, match=r"resources.gpus_per_worker = 3: \S+ has 2 GPUs"):
        expect_gpus(Resources(gpus_per_worker=3))


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


def test_whole_numbers_of_a_narrow_batch_are_widened_and_others_are_not() -> None:
    inputs = tuple(torch.ones(2, 3, dtype=kind) for kind in (torch.uint8, torch.int16, torch.int32, torch.bool))
    batch = Batch(inputs, torch.arange(2), kwargs={"mask": torch.ones(2, dtype=torch.bool)}, narrow=True)
    there = moved(batch, torch.device("cpu"), torch.float32)
    assert [one.dtype for one in there.inputs] == [torch.int64, torch.int64, torch.int64, torch.bool]
    assert there.kwargs["mask"].dtype == torch.bool
    assert not there.narrow
    kept = moved(replace(batch, narrow=False), torch.device("cpu"), torch.float32)
    assert [one.dtype for one in kept.inputs] == [one.dtype for one in inputs]


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_a_job_measures_in_its_precision(tmp_path: Path, dtype: str) -> None:
    job = small_job(tmp_path)
    job = job.model_copy(update={"numerics": job.numerics.model_copy(update={"dtype": dtype})})
    outcome, _ = run_inline(job, str(tmp_path / "census"))
    assert not outcome.failed


def test_what_is_here_and_what_is_elsewhere_do_not_mix() -> None:
    with elsewhere() as memory:
        there = torch.ones(3, device=ELSEWHERE)
        assert (there.device, there.mul(2)[1:].device) == (ELSEWHERE, ELSEWHERE)
        assert torch.equal(there.cpu() + torch.ones(3), torch.full((3,), 2.0))
        assert memory.moved == 1
        with pytest.raises(AssertionError, match=r"elsewhere.*here"):
            there + torch.ones(3)


@pytest.mark.parametrize("family", ["cnn", "deepfm", "gcn", "transformer"])
def test_a_model_is_measured_elsewhere_as_it_is_here(family: str) -> None:
    example = EXAMPLES[family]
    model = disturbed(build(family, example.task, **example.hyperparameters))
    inputs = forward_inputs(family, rows=4)
    rows = torch.arange(len(inputs[0]))
    batch, chosen = Batch(inputs, rows, rows % 2), list(statistics().values())
    here = Running(discover(model, batch), chosen, 2, choose.REFERENCE)
    with in_bulk():
        here.add(model, batch)
    with elsewhere():
        batch = moved(batch, ELSEWHERE)
        there = Running(discover(model.to(ELSEWHERE), batch), chosen, 2, choose.REFERENCE)
        there.add(model, batch)
        found = there.states()
    for name, states in here.states().items():
        for site, state in states.items():
            assert_same_bits(state, found[name][site])


def checkpoints(
    recipes: list[Recipe], device: torch.device, resume: list[Checkpoint] | None = None
) -> dict[tuple[int, int], tuple[bytes, bytes]]:
    """The checkpoints and what would be gone on from, as they are stored."""
    events = fit(recipes, portions(recipes[0].family), resume=resume, device=device)
    return {
        (one.recipe, one.step): (encode_checkpoint(one.checkpoint), encode_checkpoint(one.resume))
        for one in events
        if isinstance(one, Saved)
    }


# the CPU's attention makes its causal mask where the tensors really are
@pytest.mark.parametrize("family", sorted(set(families()) - {"gpt"}))
def test_a_model_learns_elsewhere_as_it_does_here(family: str) -> None:
    settings = {"checkpoints": (4,), "held_out": 0.2, "patience": 50, "evaluate_steps": 3, "clip_norm": 1.0}
    seeds = range(2 if families()[family].stacks else 1)
    recipes = [recipe(family, seed=seed, steps=7, optimizer="adamw", **settings) for seed in seeds]
    here = checkpoints(recipes, torch.device(CPU))
    with elsewhere() as memory:
        there = checkpoints(recipes, ELSEWHERE)
    assert there == here
    assert memory.moved
    resume = [decode_checkpoint(here[number, 4][1]) for number in seeds]
    with elsewhere():
        rest = checkpoints(recipes, ELSEWHERE, resume)
    assert rest == {key: value for key, value in here.items() if key[1] > 4}


def test_a_graph_s_neighbours_are_drawn_elsewhere() -> None:
    drawn = [recipe("gcn", steps=6, batch_rows=8, neighbours=(4, 4))]
    here = checkpoints(drawn, torch.device(CPU))
    with elsewhere():
        assert checkpoints(drawn, ELSEWHERE) == here


def test_a_job_works_on_the_device_that_it_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_build, "kernel", lambda: "no compiler")
    monkeypatch.setattr(triton_build, "lacking", lambda: "no Triton")
    monkeypatch.setattr(cost, "PASSES", 1)
    job = small_job(tmp_path, more="[resources]\ngpus_per_worker = 1\n")
    # the same run on a GPU that is this CPU: the key of every state names the device
    for module in (measuring, training):
        monkeypatch.setattr(module, "device_named", {GPU: torch.device(CPU)}.__getitem__)
    outcome, store = run_inline(job, str(tmp_path / "here"))
    for module in (measuring, training):
        monkeypatch.setattr(module, "device_named", {GPU: ELSEWHERE}.__getitem__)
    monkeypatch.setattr(task, "run_measure", measured_elsewhere)
    monkeypatch.setattr(task, "run_train", trained_elsewhere)
    other, there = run_inline(job, str(tmp_path / "there"))
    assert (other.run, other.cells, other.failed) == (outcome.run, outcome.cells, {})
    mine, yours = published(store, outcome.run), published(there, other.run)
    differing = {key.split("/")[3] for key in mine if mine[key] != yours[key] and "/tables/" in key}
    assert differing == {"receipts"}
    assert devices_of(mine) == {"cpu"}
    assert devices_of(yours) == {"meta"}
    assert [store.get(key) for key in store.keys("models/")] == [there.get(key) for key in there.keys("models/")]


def measured_elsewhere(one: MeasureTask, store: Store) -> Measured:
    # a device that is there for one task alone does not keep models
    loading._KEPT.clear()
    with elsewhere():
        return measuring.run_measure(one, store)


def trained_elsewhere(one: TrainTask, store: Store) -> dict[str, str]:
    with elsewhere() as memory:
        failed = training.run_train(one, store)
    assert memory.moved
    return failed


def devices_of(tables: dict[str, bytes]) -> set[str]:
    parts = [content for key, content in tables.items() if "/receipts/" in key]
    return {name for part in parts for name in pq.read_table(io.BytesIO(part))["device"].to_pylist()}


def test_the_reference_of_one_device_is_not_that_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.kernels.choose.name", lambda _: "reference")
    store = open_store(str(tmp_path / "store"))
    here, there = (
        resolve(small_job(tmp_path, more=f"[resources]\ngpus_per_worker = {gpus}"), store) for gpus in (0, 1)
    )
    assert here.kernel == there.kernel
    assert {here.state_name(one) for one in here.statistics}.isdisjoint(
        there.state_name(one) for one in there.statistics
    )
