"""`make bench`: what the statistics cost over the bare forward pass, and the whole path from files to states.

    python -m benchmarks                 everything, half an hour on two quiet cores
    python -m benchmarks --quick         a tenth of the rounds: to see that it works
    python -m benchmarks --check         exit 1 where a figure is beyond its limit
    python -m benchmarks --only resnet-18
    python -m benchmarks --device cuda   the statistics on a GPU, with batches of the CPU's and of 16 times the rows

Figures go to benchmarks/results/; those of the README come from there.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.cases import larger
from benchmarks.machine import machine
from benchmarks.overhead import Line, cases, measure_case
from benchmarks.path import Figure, figures, start
from pipeline.allocator import freed_memory_kept
from pipeline.devices import CPU, GPU, device_named
from pipeline.job_sections import Numerics
from pipeline.numerics import in_force

RESULTS = Path(__file__).parent / "results"
# seconds of rounds for each row, and the fewest rounds
FULL, QUICK, ON_GPU = (12.0, 5), (0.0, 2), (0.3, 5)
# of a batch's rows, where a GPU is measured: of the small ones it is the launches that count
GPU_TIMES = (1, 16)
PATH = "path"


@click.command()
@click.option("--quick", is_flag=True, help="Few rounds: to see that it works.")
@click.option("--check", is_flag=True, help="Exit 1 where a figure is beyond its limit.")
@click.option("--only", multiple=True, metavar="MODEL", help="Only this model, or `path`; may be repeated.")
@click.option("--threads", default=1, show_default=True, help="Threads of torch and of the kernel.")
@click.option("--device", default=CPU, show_default=True, type=click.Choice([CPU, GPU]), help="Where models run.")
@click.option("--save/--no-save", default=None, help="Write benchmarks/results/. [default: if everything ran in full]")
def main(quick: bool, check: bool, only: tuple[str, ...], threads: int, device: str, save: bool | None) -> None:
    """Measure what the statistics cost over the bare forward pass, and the whole path from files to states.

    It takes half an hour on two quiet cores; with --quick some minutes.
    """
    torch.set_num_threads(threads)
    on_gpu = device == GPU
    seconds, rounds = QUICK if quick else ON_GPU if on_gpu else FULL
    where = machine(threads, device_named(device))
    click.echo(", ".join(f"{name} {value}" for name, value in where.items()))
    lines: list[Line] = []
    saves = save or (save is None and not quick and not only)
    name = f"overhead-{re.sub('[^a-z0-9]+', '-', str(where['device']).lower())}" if on_gpu else "overhead"
    # of a GPU what a job does by default: other kernels are faster, and give other bits from run to run
    with in_force(Numerics(threads=threads)) if on_gpu else freed_memory_kept():
        sizes = [(case, times) for case in cases(only) for times in (GPU_TIMES if on_gpu else case.times)]
        for case, times in sizes:
            click.echo(f"\n{case.name}, {case.rows * times} rows a batch")
            for line in measure_case(larger(case, times), seconds=seconds, rounds=rounds, device=device):
                click.echo(shown(line))
                lines.append(line)
            if saves:
                # a machine that is lent may be gone before the last model
                write(name, where, [asdict(line) for line in lines])
    paths = measure_path(seconds, rounds, threads) if not on_gpu and (PATH in only or not only) else []
    if paths and saves:
        write("path", where, paths)
    report([line for line in lines if not line.within], [one for one in paths if not one.get("within", True)], check)


def measure_path(seconds: float, rounds: int, threads: int) -> list[dict[str, Any]]:
    """Print and return the figures of the whole path, and what a new worker takes to start."""
    click.echo("\nfrom files to states")
    rows: list[dict[str, Any]] = []
    for figure in figures(seconds=2 * seconds, rounds=rounds, threads=threads):
        click.echo(f"  {said(figure)}")
        rows.append({**asdict(figure), "within": figure.within})
    began = asdict(start(threads))
    click.echo("  a new worker: " + ", ".join(f"{name} {value:.4f}" for name, value in began.items()))
    return [*rows, {"name": "a new worker", **began}]


def said(figure: Figure) -> str:
    """One figure of the whole path."""
    found = figure.ratio
    text = f"{figure.name}: {found.wall:.2f} ({found.low:.2f} … {found.high:.2f}), {figure.rows_per_s:,.0f} rows/s"
    return text if figure.least is None else f"{text}  {'within' if figure.within else 'BEYOND'} {figure.least:.2f}"


def shown(line: Line) -> str:
    """One row of the table."""
    found = line.ratio
    text = f"  {line.row:38} {line.wall_ms:8.1f} ms  {found.wall:6.3f} ×  ({found.low:.3f} … {found.high:.3f})"
    text += f"  cpu {found.cpu:6.3f} ×"
    if line.peak_mib is not None:
        text += f"  {line.peak_mib:7.0f} MiB"
    if line.graph_mib:
        text += f" and {line.graph_mib:.0f} of graphs"
    if line.over != "bare forward":
        text += f"  of {line.over}"
    if line.limit is None:
        return text
    return f"{text}  {'within' if line.within else 'BEYOND'} {line.limit:.2f}"


def write(name: str, where: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Write results as JSON."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": where, "rows": list(rows)}, indent=1) + "\n")


def report(lines: Sequence[Line], paths: Sequence[dict[str, Any]], check: bool) -> None:
    """Say which figures are beyond their limits; exit 1 if that is asked for."""
    for line in lines:
        click.echo(
            f"beyond its limit: {line.model} of {line.rows} rows, {line.row}: {line.ratio.wall:.3f} × > {line.limit}"
        )
    for one in paths:
        click.echo(f"beyond its limit: {one['name']}: {one['ratio']['wall']:.3f} < {one['least']}")
    if check and (lines or paths):
        sys.exit(1)


if __name__ == "__main__":
    main()
