"""What a job would do, for a person to read before it is done.

Layer 5.
"""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from pipeline.counted import counted
from pipeline.estimate import Estimate
from pipeline.plan import Plan
from pipeline.projection import Projection
from pipeline.report.printing import fitted, lasting, size


def planned(plan: Plan, *, committed: bool) -> RenderableType:
    """What a job would do."""
    resolved = plan.resolved
    untrained = sum(task.units for task in plan.train)
    unloaded = sum(task.units for task in plan.load)
    rows = [
        ("models to train", plan.trainings, plan.trainings - untrained, untrained, len(plan.train)),
        ("models to load", plan.loads, plan.loads - unloaded, unloaded, len(plan.load)),
        ("cells to measure", plan.cells, plan.cells - plan.missing_cells, plan.missing_cells, len(plan.measure)),
    ]
    facts = [
        f"{counted(len(resolved.models), 'model')}, statistics {', '.join(one.name for one in resolved.statistics)}",
        *(
            f"{split.data}/{split.name}: {counted(split.rows, 'row')} in {counted(len(split.chunks), 'chunk')}"
            for split in resolved.splits
        ),
        f"{counted(plan.rows, 'row')} to read; states of all cells {size(plan.state_bytes)}",
    ]
    state = "committed" if committed else "not committed yet"
    return Group(
        Text(f"run {resolved.run} of job {resolved.job.name}: {state}"),
        *(Text(f"  {fact}") for fact in facts),
        Text(),
        fitted(("", "all", "stored", "to do", "tasks"), rows, width=80),
    )


def costs(estimate: Estimate, plan: Plan, *, workers: int) -> RenderableType:
    """What a job costs: rows per second and model of each shape, and the time of what is left to measure."""
    reading = [(one.data, round(1 / one.s), round(one.bytes)) for one in estimate.reading]
    shapes = [
        (one.data, one.model, len(one.models), round(1 / one.forward_s), round(one.ratio, 2), size(one.state_bytes))
        for one in estimate.shapes
    ]
    seconds = estimate.seconds(plan, workers=workers)
    parts = ", ".join(f"{name} {lasting(spent)}" for name, spent in seconds.items())
    total = lasting(sum(seconds.values()) / workers)
    return Group(
        Text(f"\nMeasured here with the kernel {estimate.kernel}, on the first rows of each data set:"),
        fitted(("data", "rows read /s", "bytes /row"), reading, width=80),
        Text(),
        fitted(("data", "model", "models", "forward rows/s", "with statistics ×", "states /chunk"), shapes, width=80),
        Text(f"\nLeft to measure: {total} on {counted(workers, 'such worker')}, training not included."),
        Text(f"Of all workers together: {parts}."),
    )


def projected(projection: Projection) -> RenderableType:
    """What a larger census would take, part by part, and what it would wait for."""
    target = projection.target
    rows = [(name, lasting(spent)) for name, spent in projection.seconds.items()]
    return Group(
        Text(
            f"\nReckoned from these, for {target.models:,} models × {target.rows:,} rows in chunks of "
            f"{target.chunk_rows:,},\n"
            f"on {target.workers:,} workers that are each {target.speed:g} × as fast as this one:"
        ),
        fitted(("part", "time that passes"), rows, width=80),
        Text(
            f"\n{lasting(projection.total_s)} in all, reading beside the rest; {target.tasks:,} tasks, "
            f"{projection.requests:,} requests, states of {size(projection.state_bytes)}."
        ),
        Text(f"The bottleneck is {projection.bottleneck}."),
    )
