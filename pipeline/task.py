"""The boundary between a run and its workers: tasks go out, receipts come back, tensors go through the store.

Layer 3. A model that fails by itself (ModelError) and rows that cannot be read (DataError) are written on the receipt,
so that the rest of the run goes on, and so is an object that is gone or spoilt; everything else is an exception of
the run.
"""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass, field, replace

from pipeline.cost import ModelCost
from pipeline.devices import CPU
from pipeline.errors import DataError, ModelError, SpoiltObject
from pipeline.manifest import File
from pipeline.measuring.run import run_measure
from pipeline.measuring.task import MeasureTask
from pipeline.pack import PackTask, run_pack
from pipeline.reduce import ReduceTask, run_reduce
from pipeline.staging import LoadTask, run_load
from pipeline.store import MissingObject, Store
from pipeline.texts import refuse_other_texts
from pipeline.training import TrainTask, run_train

Task = TrainTask | LoadTask | MeasureTask | ReduceTask | PackTask


@dataclass(frozen=True)
class Receipt:
    """What a task did: `units` of work, the `file` it packed.

    `failed` are models that failed by themselves, `unread` models that were not shown all their rows, `spoilt` those
    whose checkpoint or cells are not what they should be, `lost` those whose were there and are not any more, each with
    the reason. `remarks` say what a person should know of how it was done. For the log: what the statistics cost,
    seconds and what they were `spent` on, host, device.
    """

    kind: str
    units: int
    failed: dict[str, str] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    spoilt: dict[str, str] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    file: File | None = None
    remarks: tuple[str, ...] = ()
    costs: tuple[ModelCost, ...] = ()
    spent: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    host: str = ""
    device: str = CPU


def run_task(task: Task, store: Store) -> Receipt:
    """Run one task against the store."""
    start = time.perf_counter()
    if isinstance(task, MeasureTask | ReduceTask):
        refuse_other_texts(task.texts)
    try:
        receipt = _run(task, store)
    except DataError as error:
        receipt = Receipt(kind_of(task), 0, unread=dict.fromkeys(task.models, str(error)))
    except SpoiltObject as error:
        receipt = Receipt(kind_of(task), 0, spoilt=dict.fromkeys(task.models, str(error)))
    except MissingObject as error:
        receipt = Receipt(kind_of(task), 0, lost=dict.fromkeys(task.models, str(error)))
    return replace(receipt, seconds=time.perf_counter() - start, host=socket.gethostname())


def _run(task: Task, store: Store) -> Receipt:
    match task:
        case TrainTask():
            return Receipt(kind_of(task), task.units, failed=run_train(task, store), device=task.device)
        case LoadTask():
            staged = run_load(task, store)
            return Receipt(kind_of(task), staged.units, staged.failed, staged.unread)
        case MeasureTask():
            measured = run_measure(task, store)
            return Receipt(
                kind_of(task),
                measured.units,
                measured.failed,
                measured.unread,
                remarks=measured.remarks,
                costs=measured.costs,
                spent=dict(measured.spent),
                device=task.device,
            )
        case ReduceTask():
            return Receipt(kind_of(task), task.units, _reduce(task, store))
        case PackTask():
            return Receipt(kind_of(task), task.units, file=run_pack(task, store))


def _reduce(task: ReduceTask, store: Store) -> dict[str, str]:
    try:
        run_reduce(task, store)
    except ModelError as error:
        run_reduce(replace(task, failure=str(error)), store)
        return {task.model.id: str(error)}
    return {}


def kind_of(task: Task) -> str:
    """What a task is called on its receipt."""
    return type(task).__name__.removesuffix("Task").lower()
