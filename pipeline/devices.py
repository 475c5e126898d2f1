"""Where models are trained and measured: this machine's CPU or its GPU, and how batches get there.

Layer 1: pure torch. A task names a device that its run decided on; a machine without it must not take part.
"""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from functools import partial

import torch
from torch.utils import _pytree as pytree

from pipeline.batch import Batch
from pipeline.counted import counted
from pipeline.errors import JobError
from pipeline.job_sections import Resources

CPU, GPU = "cpu", "cuda"


def device_asked(resources: Resources) -> str:
    """Where a run's workers train and measure: on GPUs where it asks for any."""
    return GPU if resources.gpus_per_worker > 0 else CPU


def device_named(name: str) -> torch.device:
    """This machine's device of a name; JobError where torch sees no GPU and one is wanted."""
    if name == GPU:
        if not torch.cuda.is_available():
            raise JobError(
                f"resources.gpus_per_worker asks for a GPU, and torch {torch.__version__} sees none on "
                f"{socket.gethostname()}: install a CUDA build of torch there, or set it to 0"
            )
        # without a fixed workspace cuBLAS gives other bits from run to run; read when its first product is asked for
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return torch.device(name)


def expect_gpus(resources: Resources) -> None:
    """JobError unless this machine has the GPUs that a worker asks for, if any: nothing could ever start here."""
    device = device_named(device_asked(resources))
    if device.type == GPU and torch.cuda.device_count() < resources.gpus_per_worker:
        raise JobError(
            f"resources.gpus_per_worker = {resources.gpus_per_worker:g}: {socket.gethostname()} has "
            f"{torch.cuda.device_count()} GPUs"
        )


def expect_room(resources: Resources) -> None:
    """JobError unless a Ray of this machine could hold one worker; for a number of workers it is given the CPUs."""
    host, cpus, memory_gib = socket.gethostname(), os.cpu_count() or 1, machine_bytes() / 2**30
    if not resources.workers and resources.cpus_per_worker > cpus:
        raise JobError(
            f"resources.cpus_per_worker = {resources.cpus_per_worker}, or numerics.threads if that is more: {host} has "
            f"{counted(cpus, 'CPU')}; ask for less, or for resources.workers = 1, which has to do with what there is"
        )
    if resources.memory_gib and resources.memory_gib > memory_gib:
        raise JobError(f"resources.memory_gib = {resources.memory_gib:.10g}: {host} has {memory_gib:.1f} GiB")


def limit_gpu(share: float) -> None:
    """Leave the rest of this process's GPU to those it is shared with: to Ray a fraction is bookkeeping only."""
    if 0 < share < 1 and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(share)


def memory_bytes(resources: Resources) -> int | None:
    """What one worker has on the device where it measures: its share of this machine's; None if that is not told."""
    share = resources.gpus_per_worker
    if share > 0:
        return int(torch.cuda.mem_get_info()[1] * min(1.0, share)) if torch.cuda.is_available() else None
    if resources.memory_gib:
        return int(resources.memory_gib * 2**30)
    return int(machine_bytes() * min(1.0, resources.cpus_per_worker / (os.cpu_count() or 1)))


def machine_bytes() -> int:
    """This machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def full_name(device: torch.device) -> str:
    """What a device is called where results are recorded: of GPUs the model too, because their bits differ."""
    return f"{GPU}: {torch.cuda.get_device_name(device)}" if device.type == GPU else device.type


def moved(batch: Batch, device: torch.device, dtype: torch.dtype | None = None) -> Batch:
    """The batch on a device, its inputs' floats in a model's dtype if one is given, and what is narrow as int64.

    Its inputs are tensors of its own, if of the same memory: what a forward leaves on them is on none of the caller's.
    To a GPU it goes through pinned memory, and nothing waits for it but what reads it.
    """
    names = {name: getattr(batch, name) for name in ("uid_N", "label_N", "label_NS", "mask_NS")}
    inputs = {name: getattr(batch, name) for name in ("inputs", "kwargs")}
    move = partial(_moved, device=device)
    made: dict[int, torch.Tensor] = {}

    def read(value: torch.Tensor) -> torch.Tensor:
        # one that is given twice stays one
        if id(value) not in made:
            there = _moved(value, device=device, dtype=dtype, widen=batch.narrow)
            made[id(value)] = _another(value) if there is value else there
        return made[id(value)]

    mapped = pytree.tree_map_only(torch.Tensor, move, names) | pytree.tree_map_only(torch.Tensor, read, inputs)
    return replace(batch, **mapped, narrow=False)


def _moved(
    value: torch.Tensor, *, device: torch.device, dtype: torch.dtype | None = None, widen: bool = False
) -> torch.Tensor:
    source = value.pin_memory() if device.type == GPU and value.device.type == CPU else value
    there = source.to(device, non_blocking=True)
    if there.is_floating_point():
        return there if dtype is None else there.to(dtype)
    return there.to(torch.int64) if widen and there.dtype != torch.bool else there


def _another(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as another tensor, with whatever its class keeps beside it."""
    made = tensor.detach()
    vars(made).update(vars(tensor))
    return made.requires_grad_() if tensor.requires_grad else made
