"""How much faster models of one shape train together than one by one: python -m benchmarks.training

MLPs 64-128-64-10 at batch 32, SGD with momentum and weight decay, one thread each; the time is the process's own CPU
time, so that a busy machine changes it little. The claim: 64 together at least 4 × faster than plain PyTorch.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.nn import functional

from benchmarks.asked import parser
from pipeline.batch import Batch
from pipeline.fit.learners import Stack
from pipeline.fit.rows import order_of
from pipeline.fit.settings import Training
from pipeline.models.base import Task
from pipeline.registry import families

ROWS, TASK, HIDDEN = 1440, Task((64,), 10), (128, 64)
SETTINGS = Training(batch_rows=32)
REPEATS = 5


def data() -> Batch:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, *TASK.shape, generator=generator)
    return Batch((x,), torch.arange(ROWS), torch.randint(TASK.outputs, (ROWS,), generator=generator))


def build(seed: int) -> torch.nn.Module:
    family = families()["mlp"]
    torch.manual_seed(seed)
    return family.build(family.parameters(widths=HIDDEN), TASK)  # type: ignore[no-any-return]


def together(models: int, rows: Batch) -> Callable[[], None]:
    """A step of all of them."""
    stack = Stack(families()["mlp"], [build(seed) for seed in range(models)], [SETTINGS] * models)
    index_GN = torch.stack([order_of(ROWS, seed=seed, window=0) for seed in range(models)])[:, : SETTINGS.batch_rows]

    def step() -> None:
        stack.losses(rows, index_GN)
        stack.update(1.0)

    return step


def alone(rows: Batch) -> Callable[[], None]:
    """A step of one of them, as anyone would write it."""
    model = build(0)
    optimizer = torch.optim.SGD(
        model.parameters(), SETTINGS.learning_rate, SETTINGS.momentum, weight_decay=SETTINGS.weight_decay
    )
    index = order_of(ROWS, seed=0, window=0)[: SETTINGS.batch_rows]
    label = rows.label_N
    assert label is not None

    def step() -> None:
        loss = functional.cross_entropy(model(rows.inputs[0][index]), label[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def seconds(step: Callable[[], None], count: int) -> float:
    """CPU seconds of one step: the least of several means."""
    for _ in range(3):
        step()
    means = []
    for _ in range(REPEATS):
        start = time.process_time()
        for _ in range(count):
            step()
        means.append((time.process_time() - start) / count)
    return min(means)


def main() -> None:
    torch.set_num_threads(1)
    rows = data()
    one = seconds(alone(rows), 200)
    print(f"one by one    {one * 1e6:7.0f} µs per model and step")
    for models in (1, 2, 4, 8, 16, 32, 64):
        each = seconds(together(models, rows), max(10, 200 // models)) / models
        print(f"{models:3} together  {each * 1e6:7.0f} µs per model and step, {one / each:5.1f} × as fast")


if __name__ == "__main__":
    parser("training", __doc__, takes="half a minute").parse_args()
    main()
