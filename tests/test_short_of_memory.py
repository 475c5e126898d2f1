"""Too little memory is no fault of the model, of its stored weights or of the data: nothing is refused for it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

import pipeline.cells
import pipeline.measuring.chunk
import pipeline.models.base
from pipeline.batch import Batch
from pipeline.cells import decode_cell
from pipeline.errors import Unfinished, breaks_the_process, is_machines_fault
from pipeline.executor import InlineExecutor, Lost
from pipeline.flow.discover import discover
from pipeline.flow.forwards import Forwards
from pipeline.flow.gradients import observe_gradients
from pipeline.flow.tap import tapped_forward
from pipeline.inputs import input_file
from pipeline.manifest import manifest_key
from pipeline.models.base import decode_checkpoint
from pipeline.rows import groups
from pipeline.rows.footers import read_footer
from pipeline.rows.groups import read_groups
from pipeline.run import run
from pipeline.store import open_store
from tests.census import published, run_inline, small_job


def exhaust(*_: Any, **__: Any) -> Any:
    """Ask torch for more than any machine has, 4 PiB."""
    return torch.ones(1 << 50)


class Hungry(nn.Module):
    """Asks for too much once it is hungry, behind a layer that has been seen."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.is_hungry = nn.Linear(3, 4), nn.Linear(4, 2), False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x).relu()
        return self.second(hidden + exhaust() if self.is_hungry else hidden)


def in_a_script(model: nn.Module, found: Any, batch: Batch, observe: Any) -> None:
    forwards = Forwards(found)
    assert isinstance(model, Hungry)
    model.is_hungry = False
    for _ in range(4):
        forwards.run(model, batch, observe)
    model.is_hungry = True
    forwards.run(model, batch, observe)


@pytest.mark.parametrize("observed", [tapped_forward, partial(observe_gradients, classes=2), in_a_script])
def test_a_forward_without_memory_is_no_fault_of_the_model(observed: Callable[..., Any]):
    model = Hungry().eval()
    batch = Batch(inputs=(torch.randn(6, 3),), uid_N=torch.arange(6), label_N=torch.tensor([0, 1] * 3))
    found = discover(model, batch)
    model.is_hungry = True
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator: ") as short:
        observed(model, found, batch, lambda _: None)
    assert is_machines_fault(short.value)
    assert "site" not in str(short.value)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator: "):
        discover(model, batch)


def test_what_torch_says_of_a_gpu_is_known():
    assert is_machines_fault(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert is_machines_fault(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"))
    assert is_machines_fault(pa.ArrowMemoryError("malloc of size 64 failed"))
    assert is_machines_fault(torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"))
    assert breaks_the_process(torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"))
    assert not breaks_the_process(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert not breaks_the_process(None)
    assert is_machines_fault(RuntimeError("std::bad_alloc"))
    assert is_machines_fault(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"))
    assert is_machines_fault(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert not is_machines_fault(OSError(errno.ENOENT, "No such file or directory"))
    assert not is_machines_fault(ValueError("DefaultCPUAllocator: "))


def test_a_run_stays_open_for_it_and_ends_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, plain = run_inline(small_job(tmp_path), str(tmp_path / "plain"))
    shown, times = pipeline.measuring.chunk._show, []

    def short(*given: Any, **named: Any) -> Any:
        times.append(1)
        return exhaust() if len(times) == 3 else shown(*given, **named)

    store = open_store(str(tmp_path / "short"))
    with monkeypatch.context() as patched:
        patched.setattr(pipeline.measuring.chunk, "_show", short)
        run(small_job(tmp_path), store, InlineExecutor())
        assert len(times) > 3, "the task was cut in parts, of which every one had enough"
    assert published(store, expected.run) == published(plain, expected.run)

    store = open_store(str(tmp_path / "never"))
    with monkeypatch.context() as patched:
        patched.setattr(pipeline.measuring.chunk, "_show", exhaust)
        with pytest.raises(
            Unfinished, match=r"is not finished.*\n.*: this machine could not: RuntimeError: .*4503599627"
        ):
            run(small_job(tmp_path), store, InlineExecutor())
    assert not store.keys(manifest_key(expected.run))
    run(small_job(tmp_path), store, InlineExecutor())
    assert published(store, expected.run) == published(plain, expected.run)


def test_whatever_else_a_task_raises_is_raised_by_the_executor_in_this_process() -> None:
    def do(task: int) -> int:
        return exhaust() if task == 1 else task // (task - 2)

    outcomes = InlineExecutor().map(do, [0, 1, 2])
    assert next(outcomes) == (0, 0)
    number, lost = next(outcomes)
    assert number == 1
    assert isinstance(lost, Lost)
    with pytest.raises(ZeroDivisionError):
        next(outcomes)


def test_nothing_more_is_tried_in_a_process_whose_gpu_failed() -> None:
    tried = []

    def do(task: int) -> int:
        tried.append(task)
        if task == 1:
            raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")
        return task

    outcomes = [outcome for _, outcome in InlineExecutor().map(do, range(4))]
    assert tried == [0, 1]
    assert outcomes[0] == 0
    assert all(isinstance(one, Lost) and "uncorrectable ECC" in one.reason for one in outcomes[1:])


@pytest.mark.parametrize(
    ("module", "decode"), [(pipeline.cells, decode_cell), (pipeline.models.base, decode_checkpoint)]
)
def test_what_is_stored_is_not_taken_for_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, decode: Callable[[bytes], Any]
) -> None:
    _, store = run_inline(small_job(tmp_path), str(tmp_path / "store"))
    prefix = "states/" if decode is decode_cell else "models/"
    content = store.get(store.keys(prefix)[0])
    decode(content)
    monkeypatch.setattr(module, "load", exhaust)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator: "):
        decode(content)


def test_rows_are_not_taken_for_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"x": [1.0, 2.0]}), path)
    opened = groups._parquet

    def without_memory(*given: Any) -> Any:
        opened(*given)

        def read(_: int) -> Any:
            raise pa.ArrowMemoryError("malloc of size 64 failed")

        return read

    monkeypatch.setattr(groups, "_parquet", without_memory)
    file_id = read_footer(str(path), input_file(str(path))).file_id
    with pytest.raises(pa.ArrowMemoryError):
        list(read_groups(str(path), file_id, [0], ["x"]))
