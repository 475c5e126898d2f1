"""What measuring holds in memory: the state of every unit, and the peak over ten times the rows.

    python -m benchmarks.memory

A process for each number of rows, so that each peak is its own; rows are made batch by batch.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Iterator

import torch
from torch import nn

from benchmarks.asked import parser
from pipeline.batch import Batch
from pipeline.flow.discover import discover
from pipeline.registry import statistics
from pipeline.running import Running

BATCH_ROWS, CLASSES = 64, 10
# rows of the two measurements: the first is enough for every buffer to have its size
FEW, TIMES = 6 * BATCH_ROWS, 10
PROCESSES = 3
# vectors of a unit's inputs and the rows that stand for it are as large as they are
VECTORS = ("cov_UD", "fired_UD", "x_mean_KD", "mean_GD", "m2_GDD")


def network() -> nn.Module:
    """A convolutional network with a wide dense layer."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(16 * 16, 256), nn.GELU(), nn.Linear(256, CLASSES),
    )  # fmt: skip


def rows_of(rows: int) -> Iterator[Batch]:
    """Made-up images with labels."""
    generator = torch.Generator().manual_seed(0)
    for start in range(0, rows, BATCH_ROWS):
        x = torch.randn(BATCH_ROWS, 1, 8, 8, generator=generator)
        label = torch.randint(CLASSES, (BATCH_ROWS,), generator=generator)
        yield Batch((x,), torch.arange(start, start + BATCH_ROWS), label)


def peak_bytes(rows: int) -> int:
    """Measure so many rows with every statistic in this process; the most memory that it has ever held."""
    model = network().eval()
    running = Running(discover(model, next(rows_of(BATCH_ROWS))), list(statistics().values()), CLASSES)
    for batch in rows_of(rows):
        running.add(model, batch)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peaks() -> tuple[int, int]:
    """The peaks of a measurement and of one with ten times the rows: of each the least of some processes.

    What an allocator keeps differs by some MB from one process to the next, whatever the rows.
    """
    found: dict[int, list[int]] = {FEW: [], TIMES * FEW: []}
    for _ in range(PROCESSES):
        for rows, of_each in found.items():
            code = f"from benchmarks.memory import peak_bytes; print(peak_bytes({rows}))"
            of_each.append(int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout))
    few, many = map(min, found.values())
    return few, many


def bytes_per_unit() -> dict[str, float]:
    """By statistic, the bytes of a unit's state beside vectors of its inputs: the most of any site of the network."""
    model = network().eval()
    running = Running(discover(model, next(rows_of(BATCH_ROWS))), list(statistics().values()), CLASSES)
    for batch in rows_of(BATCH_ROWS):
        running.add(model, batch)
    found = {}
    for name, states in running.states().items():
        of_sites = []
        for site in running.discovery.sites:
            state = states.get(site.name, {})
            counted = sum(
                value.numel() * value.element_size()
                for key, value in state.items()
                if key.rpartition(".")[2] not in VECTORS
            )
            of_sites.append(counted / site.units)
        found[name] = max(of_sites)
    return found


if __name__ == "__main__":
    parser("memory", __doc__, takes="some four minutes").parse_args()
    few, many = peaks()
    unit = bytes_per_unit()
    print(json.dumps({"peak_bytes": few, "peak_bytes_of_ten_times_the_rows": many, "ratio": many / few, "unit": unit}))
