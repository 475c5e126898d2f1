"""What it takes to name and plan models that lie in a directory: python -m benchmarks.loading [COUNT]

MLPs 64-8-10 as safetensors; seconds of the process's own CPU time, so that a busy machine changes them little, and how
far the process grew. Twice: `new` hashes every file, `known` finds what was hashed.
"""

from __future__ import annotations

import os
import resource
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import safetensors.torch
import torch

from benchmarks.asked import parser
from pipeline.foreign.digests import SETTLED_S
from pipeline.job import load_job
from pipeline.models.base import Task
from pipeline.plan import make_plan
from pipeline.registry import families
from pipeline.resolve import resolve
from pipeline.store import open_store

T = TypeVar("T")

JOB = """
name = "many"
[data.digits]
source = "digits"
[[models]]
data = "digits"
load = { url = "models/*", family = "mlp", arguments = { widths = [8] } }
"""


def timed(what: str, work: Callable[[], T]) -> T:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    made = work()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{what:16}{time.process_time() - start:8.2f} s{grown / 1024:10.0f} MiB more")
    return made


def main(count: int) -> None:
    family = families()["mlp"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "models").mkdir()
        Path(folder, "job.toml").write_text(JOB)
        settled = time.time() - 2 * SETTLED_S
        for seed in range(count):
            torch.manual_seed(seed)
            path = Path(folder, "models", f"{seed}.safetensors")
            state = dict(family.build(family.parameters(widths=(8,)), Task((1, 8, 8), 10)).state_dict())
            path.write_bytes(safetensors.torch.save(state))
            os.utime(path, (settled, settled))
        job, store = load_job(Path(folder, "job.toml")), open_store(str(Path(folder, "store")))
        for known in ("new", "known"):
            resolved = timed(f"resolve, {known}", partial(resolve, job, store))
            resolved.findings.release()
            plan = timed("plan", partial(make_plan, resolved, store, workers=2))
        print(
            f"{plan.loads} models to load in {len(plan.load)} tasks, {plan.missing_cells} cells in {len(plan.measure)}"
        )


if __name__ == "__main__":
    arguments = parser("loading", __doc__, takes="half a minute")
    arguments.add_argument("count", metavar="COUNT", nargs="?", type=int, default=1000, help="models; default: 1000")
    main(arguments.parse_args().count)
