"""One resident worker, and how many of them there is room for.

Layer 5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import ray

from pipeline.allocator import give_back_freed_memory
from pipeline.counted import counted
from pipeline.job_sections import Resources

T = TypeVar("T")
R = TypeVar("R")


class _Worker:
    """A resident process: imports and loaded models stay warm between calls."""

    def __init__(self, gpu_share: float) -> None:
        if 0 < gpu_share < 1:
            from pipeline.devices import limit_gpu  # torch, which a worker without tasks does not need

            limit_gpu(gpu_share)

    def ready(self) -> None:
        """Answer as soon as the process runs."""

    def call(self, function: Callable[[T], R], task: T) -> R:
        """Do a task."""
        return function(task)

    def rest(self) -> None:
        """Give back the memory that calls have kept for each other."""
        give_back_freed_memory()


def start_worker(resources: Resources) -> Any:
    """A new worker with what the resources give each."""
    # never restarted by Ray: the pool starts another one, and knows when it is ready
    memory = {"memory": int(resources.memory_gib * 2**30)} if resources.memory_gib else {}
    options: dict[str, Any] = {"num_cpus": resources.cpus_per_worker, "num_gpus": resources.gpus_per_worker, **memory}
    return ray.remote(max_restarts=0, max_task_retries=0, **options)(_Worker).remote(resources.gpus_per_worker)


def workers_asked_for(resources: Resources) -> int:
    """Workers that were asked for, or as many as the cluster has room for now; one where it has none yet."""
    if resources.workers:
        return resources.workers
    return max(1, sum(room_of(node["Resources"], resources) for node in ray.nodes() if node["Alive"]))


def lacking(resources: Resources) -> str | None:
    """What a worker takes and no node that is there could ever hold, beside what the nodes have; None if one could."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(room_of(there, resources) for there in nodes):
        return None
    have = "; ".join(dict.fromkeys(map(described, nodes))) or "none"
    return f"a worker takes {_asked(resources)}, which no node of Ray's has (nodes: {have})"


def described(there: Mapping[str, float]) -> str:
    """What a node or a cluster has, in words.

    >>> described({"CPU": 2.0, "memory": 3 * 2**30})
    '2 CPUs, 0 GPUs, 3.0 GiB of memory'
    """
    units = [f"{there.get(name, 0):g} {name}s" for name in ("CPU", "GPU")]
    return ", ".join([*units, f"{there.get('memory', 0) / 2**30:.1f} GiB of memory"])


def _asked(resources: Resources) -> str:
    share, memory_gib = resources.gpus_per_worker, resources.memory_gib
    gpus = [f"{share:g} GPU{'s' if share > 1 else ''}"] if share else []
    memory = [f"{memory_gib:.10g} GiB of memory"] if memory_gib else []
    return ", ".join([counted(resources.cpus_per_worker, "CPU"), *gpus, *memory])


def room_of(there: Mapping[str, float], resources: Resources) -> int:
    """How many workers one node has room for; a share of a GPU is all of the same one."""
    share = resources.gpus_per_worker
    room = [int(there.get("CPU", 0) // resources.cpus_per_worker)]
    if 0 < share < 1:
        # in Ray's steps: of 0.1 there are ten
        room.append(int(there.get("GPU", 0)) * int(10_000 // round(share * 10_000)))
    elif share:
        room.append(int(there.get("GPU", 0) // share))
    if resources.memory_gib:
        room.append(int(there.get("memory", 0) // (resources.memory_gib * 2**30)))
    return min(room)
