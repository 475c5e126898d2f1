"""What the tasks of a run hold at most of a model with one wide layer, beside what the process held before each.

    python -m benchmarks.reducing 2048 template response

A perceptron 64-WIDTH-WIDTH-10 on the digits, one step of training, its training rows in 16 chunks; without names of
statistics all of them. Peaks are the kernel's (VmHWM, set back before each task), so they need Linux.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.asked import parser
from pipeline.executor import InlineExecutor
from pipeline.hashing import sha256
from pipeline.job import load_job
from pipeline.registry import statistics
from pipeline.run import run
from pipeline.store import open_store

JOB = """
name = "wide"
[numerics]
batch_rows = 64
[data.digits]
source = "digits"
measure = ["train"]
chunk_rows = 100
[[models]]
family = "mlp"
data = "digits"
control = false
hyperparameters = {{ widths = [{width}, {width}] }}
training = {{ steps = 1 }}
{statistics}
"""


class Watched(InlineExecutor):
    """Runs tasks here and notes the peak of each kind in bytes, and the CPU's seconds of all of a kind."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self.seconds: dict[str, float] = {}

    def map(self, function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """See `InlineExecutor`."""
        for number, task in enumerate(tasks):
            Path("/proc/self/clear_refs").write_text("5")
            before, start = status("VmRSS"), time.process_time()
            receipt = function(task)
            name = type(task).__name__
            self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - start
            self.peaks[name] = max(self.peaks.get(name, 0), status("VmHWM") - before)
            yield number, receipt


def status(name: str) -> int:
    """Bytes of memory of this process: VmRSS, what it holds, VmHWM, the most since that was set back."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def peaks(width: int, chosen: Sequence[str]) -> dict[str, Any]:
    """Bytes and seconds by kind of task, bytes of the largest cell, SHA-256 of all that was reduced and published."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        path = root / "job.toml"
        path.write_text(JOB.format(width=width, statistics="\n".join(f"[statistics.{name}]" for name in chosen)))
        executor = Watched()
        run(load_job(path), open_store(str(root / "store")), executor)
        files = [one for one in root.glob("store/runs/**/*") if one.is_file() and "log" not in one.parts]
        names = {one: str(one.relative_to(root / "store")) for one in files}
        return {
            "peak": executor.peaks,
            "seconds": executor.seconds,
            "chunks": len({one.name for one in root.glob("store/states/**/*.safetensors")}),
            "largest_cell": max(one.stat().st_size for one in root.glob("store/states/**/*.safetensors")),
            "sha256": {name: sha256(one.read_bytes()) for one, name in sorted(names.items())},
        }


if __name__ == "__main__":
    asked = parser("reducing", __doc__, takes="half a minute at a width of 2048, two minutes at 4096")
    asked.add_argument("width", type=int, nargs="?", default=2048)
    asked.add_argument("statistics", nargs="*")
    given = asked.parse_args()
    print(json.dumps(peaks(given.width, given.statistics or sorted(statistics())), indent=1))
