"""What a job would do, for a person to read before it is done.

Layer 5.
"""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from pipeline.plan import Plan
from pipeline.report.printing import fitted, size


def planned(plan: Plan, *, committed: bool) -> RenderableType:
    """What a job would do."""
    resolved = plan.resolved
    rows = [
        ("models to train", plan.trainings, plan.trainings - len(plan.train), len(plan.train), len(plan.train)),
        ("cells to measure", plan.cells, plan.cells - plan.missing_cells, plan.missing_cells, len(plan.measure)),
    ]
    facts = [
        f"{len(resolved.models)} models, statistics {', '.join(one.name for one in resolved.statistics)}",
        *(f"{split.data}/{split.name}: {split.rows} rows in {len(split.chunks)} chunks" for split in resolved.splits),
        f"{plan.rows} rows to read; states of all cells {size(plan.state_bytes)}",
    ]
    state = "committed" if committed else "not committed yet"
    return Group(
        Text(f"run {resolved.run} of job {resolved.job.name}: {state}"),
        *(Text(f"  {fact}") for fact in facts),
        Text(),
        fitted(("", "all", "stored", "to do", "tasks"), rows, width=80),
    )
