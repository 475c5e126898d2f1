"""What a GPU is told for one batch: the operations of the forward, and those that statistics of pairs of numbers add.

    python -m benchmarks.launches resnet-18 64

Counted on the CPU, without a GPU, by what is done at once there (pipeline/kernels/bulk.py). Statistics of samples are
counted as if all rows were in the sample. What the Triton kernel does is not counted: it has none of these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import click
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cases import CASES, batches, build, in_sample
from pipeline.flow.discover import discover
from pipeline.kernels import bulk, native_deviations, native_tiles
from pipeline.registry import statistics
from pipeline.running import Running

NAMES = ("template", "composition", "redundancy", "importance")
# what launches nothing: views, memory that is asked for, questions about types
FREE = {
    "alias", "as_strided", "can_cast", "detach", "empty", "empty_like", "expand", "new_empty", "permute",
    "promote_types", "select", "slice", "split", "squeeze", "transpose", "unbind", "unfold", "unsqueeze", "view",
}  # fmt: skip
WAITS = ("_local_scalar_dense", "is_nonzero", "nonzero")


class Launches(TorchDispatchMode):
    """Counts the operations that a GPU would be told, and how often Python would wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    @property
    def waits(self) -> int:
        """Operations whose result Python reads."""
        return sum(self.count[name] for name in WAITS)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count it, do it; what is made of other operations is counted as those."""
        if func._can_decompose():
            with self:
                return func.decompose(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if name not in FREE:
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Within the block sums and products are those of a GPU, in the CPU's memory."""
    with (
        patch.object(bulk, "in_bulk", lambda value: True),
        patch.object(native_tiles, "kernel", lambda: None),
        patch.object(native_deviations, "takes", lambda *values: False),
    ):
        yield


def counted(model: str, rows: int) -> Iterator[tuple[str, Launches]]:
    """The bare forward, then each statistic together with its forward."""
    case = replace(next(one for one in CASES if one.name == model), rows=rows)
    module, several = build(case), batches(case)
    batch = in_sample(several, 5, wanted=rows)[0]
    with torch.no_grad(), Launches() as seen:
        batch.forward(module)
    yield "bare forward", seen
    found = discover(module, batch)
    for name in NAMES:
        running = Running(found, [statistics()[name]], case.task.outputs)
        with as_on_a_gpu():
            # the second batch finds what is remembered of shapes
            running.add(module, batch)
            with Launches() as seen:
                running.add(module, batch)
        yield name, seen


@click.command()
@click.argument("model", type=click.Choice([case.name for case in CASES]))
@click.argument("rows", type=click.IntRange(1))
def main(model: str, rows: int) -> None:
    """Count the launches of one batch of ROWS rows of MODEL, statistic by statistic, without a GPU.

    It takes half a minute for 64 rows of resnet-18.
    """
    click.echo(f"{'':14} {'launches':>9} {'waits':>6}   most of them")
    for name, seen in counted(model, rows):
        most = ", ".join(f"{what} {count}" for what, count in seen.count.most_common(5))
        click.echo(f"{name:14} {seen.count.total():9,} {seen.waits:6,}   {most}")


if __name__ == "__main__":
    main()
