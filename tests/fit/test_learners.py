"""Models that learn together: the same to the bit as alone, and what PyTorch makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from pipeline.batch import Batch
from pipeline.fit.learners import Learners, Single, Stack, can_stack
from pipeline.fit.rows import order_of
from pipeline.fit.settings import Training
from pipeline.models.base import Family, Task
from pipeline.registry import families

MLP: Family = families()["mlp"]
ROWS = 192


def build(seed: int, task: Task, dtype: torch.dtype = torch.float32, **hyperparameters: Any) -> nn.Module:
    torch.manual_seed(seed)
    return MLP.build(MLP.parameters(**hyperparameters), task).to(dtype)


def data(task: Task, dtype: torch.dtype = torch.float32) -> Batch:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(ROWS, *task.shape, generator=generator, dtype=torch.float64).to(dtype)
    return Batch((x,), torch.arange(ROWS), torch.randint(task.outputs, (ROWS,), generator=generator))


def train(learners: Learners, rows: Batch, seeds: Sequence[int], training: Training, steps: int = 20) -> None:
    order_GW = torch.stack([order_of(ROWS, seed=seed, window=0) for seed in seeds])
    batches = order_GW.split(training.batch_rows, dim=1)
    for step in range(steps):
        learners.losses(rows, batches[step % len(batches)])
        if training.clip_norm is not None:
            learners.clip(training.clip_norm)
        learners.update(1 - step / steps)


RATES = {0: 0.05, 1: 0.05, 2: 0.02, 3: 0.02, 4: 0.05, 5: 0.1, 6: 0.05, 7: 0.05}
SHAPES = [
    (Task((64,), 10), {"widths": (128, 64)}, 32, torch.float32),
    (Task((13,), 3), {"widths": (16,), "gate": "gelu"}, 16, torch.float32),
    (Task((7,), 2), {"widths": (48, 16), "gate": "tanh"}, 48, torch.float32),
    (Task((1, 3, 3), 5), {"widths": (16, 32), "gate": "gelu"}, 16, torch.float64),
]


@pytest.mark.parametrize(("task", "hyperparameters", "batch_rows", "dtype"), SHAPES)
@pytest.mark.parametrize("settings", [{}, {"optimizer": "adamw", "clip_norm": 0.5, "label_smoothing": 0.1}])
def test_no_bit_of_a_model_depends_on_its_group(
    task: Task, hyperparameters: dict[str, Any], batch_rows: int, dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    rows = data(task, dtype)

    def weights(seeds: Sequence[int]) -> list[torch.Tensor]:
        trainings = [Training(batch_rows=batch_rows, learning_rate=RATES[seed], **settings) for seed in seeds]
        models = [build(seed, task, dtype, **hyperparameters) for seed in seeds]
        assert can_stack(MLP, models[0], trainings[0])
        stack = Stack(MLP, models, trainings)
        train(stack, rows, seeds, trainings[0])
        states = [stack.state(number) for number in range(len(seeds))]
        return [torch.cat([value.flatten() for value in state.values()]) for state in states]

    alone = {seed: weights([seed])[0] for seed in range(8)}
    for seeds in ([0, 1], [3, 2], [0, 1, 2, 3, 4], [4, 3, 2, 1, 0], list(range(8)), list(reversed(range(8)))):
        for seed, found in zip(seeds, weights(seeds), strict=True):
            assert torch.equal(found, alone[seed]), f"seed {seed} among {seeds}"


def plain(model: nn.Module, rows: Batch, seed: int, training: Training, steps: int = 20) -> nn.Module:
    """What anyone would write."""
    if training.optimizer == "sgd":
        kind: Any = torch.optim.SGD(
            model.parameters(), training.learning_rate, training.momentum, weight_decay=training.weight_decay
        )
    else:
        kind = torch.optim.AdamW(
            model.parameters(),
            training.learning_rate,
            (training.beta1, training.beta2),
            weight_decay=training.weight_decay,
        )
    scheduler = torch.optim.lr_scheduler.LambdaLR(kind, lambda step: 1 - step / steps)
    order = order_of(ROWS, seed=seed, window=0).split(training.batch_rows)
    for step in range(steps):
        index = order[step % len(order)]
        label = rows.label_N
        assert label is not None
        loss = functional.cross_entropy(
            model(rows.inputs[0][index]), label[index], label_smoothing=training.label_smoothing
        )
        kind.zero_grad()
        loss.backward()
        if training.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), training.clip_norm)
        kind.step()
        scheduler.step()
    return model


@pytest.mark.parametrize(
    "settings", [{}, {"optimizer": "adamw", "learning_rate": 0.003}, {"clip_norm": 0.3}, {"clip_norm": 30.0}]
)
@pytest.mark.parametrize("stacked", [True, False])
def test_twenty_steps_are_those_of_plain_pytorch(settings: dict[str, Any], stacked: bool) -> None:
    task = Task((64,), 10)
    training = Training(batch_rows=32, **({"learning_rate": 0.05, "label_smoothing": 0.1} | settings))
    models = [build(seed, task, widths=(128, 64)) for seed in range(3)]
    rows = data(task)
    for seed, model in enumerate(models):
        expected = plain(build(seed, task, widths=(128, 64)), rows, seed, training)
        if stacked:
            learners: Learners = Stack(MLP, [build(one, task, widths=(128, 64)) for one in range(3)], [training] * 3)
            train(learners, rows, range(3), training)
            found = learners.module(learners.state(seed))
        else:
            learners = Single(MLP, model, training)
            train(learners, rows, [seed], training)
            found = learners.module(learners.state(0))
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(found.state_dict()[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gate", ["relu", "gelu", "tanh"])
def test_a_familys_own_stacked_forward_is_what_vmap_makes_of_its_module(gate: str) -> None:
    models = [build(seed, Task((1, 3, 3), 5), widths=(16, 32), gate=gate) for seed in range(4)]
    weights, _ = torch.func.stack_module_state(models)
    x = torch.randn(4, 7, 1, 3, 3)
    expected = Family.stacked(MLP, models[0])(weights, (x,), {})
    torch.testing.assert_close(MLP.stacked(models[0])(weights, (x,), {}), expected, rtol=1e-6, atol=1e-6)


def shaped(width: int = 16, inputs: int = 8, family: Family = MLP, **training: Any) -> bool:
    model = build(0, Task((inputs,), 3), widths=(width,))
    return can_stack(family, model, Training(**({"batch_rows": 16} | training)))


def test_only_what_fills_cache_lines_stacks() -> None:
    assert shaped()
    assert not shaped(batch_rows=20)
    assert not shaped(width=12, inputs=8)
    assert shaped(width=16, inputs=1) is False  # a product with one column may be another kernel
    assert not shaped(autocast="bfloat16")
    assert not shaped(autocast="float16")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_half_precision_is_pytorchs_with_its_scaled_loss(optimizer: str, clip_norm: float | None) -> None:
    task = Task((8,), 3)
    rows, training = data(task), Training(batch_rows=16, optimizer=optimizer, clip_norm=clip_norm, autocast="float16")
    learners = Single(MLP, build(0, task, widths=(16,)), training)
    train(learners, rows, [0], training)
    expected = with_a_scaled_loss(build(0, task, widths=(16,)), rows, training)
    for name, value in expected.state_dict().items():
        assert torch.equal(learners.model.state_dict()[name], value)


def with_a_scaled_loss(model: nn.Module, rows: Batch, training: Training) -> nn.Module:
    """As PyTorch's documentation of automatic mixed precision has it."""
    settings = {"lr": training.learning_rate, "weight_decay": training.weight_decay}
    make: Any = {"sgd": partial(torch.optim.SGD, momentum=training.momentum), "adamw": torch.optim.AdamW}
    optimizer = make[training.optimizer](model.parameters(), **settings)
    scaler = torch.amp.GradScaler("cpu")
    batches = order_of(ROWS, seed=0, window=0).split(training.batch_rows)
    assert rows.label_N is not None
    for step in range(20):
        index = batches[step % len(batches)]
        optimizer.param_groups[0]["lr"] = training.learning_rate * (1 - step / 20)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            logits = model(rows.inputs[0][index])
        scaler.scale(functional.cross_entropy(logits.float(), rows.label_N[index])).backward()
        if training.clip_norm is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), training.clip_norm)
        scaler.step(optimizer)
        scaler.update()
    return model


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_gradient_that_overflows_is_left_out_and_the_loss_scaled_less(optimizer: str) -> None:
    task = Task((8,), 3)
    rows = data(task)
    large = Batch((rows.inputs[0] * 6e4,), rows.uid_N, rows.label_N)
    training = Training(batch_rows=16, optimizer=optimizer, learning_rate=0.01, autocast="float16")
    learners = Single(MLP, build(0, task, widths=(16,)), training)
    before = learners.state(0)
    train(learners, large, [0], training, steps=1)
    after = learners.state(0)
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("weights."))
    assert after["scaler.scale"] == before["scaler.scale"] / 2
    train(learners, rows, [0], training, steps=3)
    assert learners.state(0)["scaler._growth_tracker"] == 3
    assert all(value.isfinite().all() for value in learners.state(0).values())
    other = Single(MLP, build(1, task, widths=(16,)), training)
    other.restore([learners.state(0)])
    for one in (learners, other):
        train(one, large, [0], training, steps=1)
        train(one, rows, [0], training, steps=2)
    left, right = learners.state(0), other.state(0)
    assert left["scaler.scale"] == before["scaler.scale"] / 4
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("name", sorted(set(families()) - {"mlp"}))
def test_other_families_learn_alone(name: str) -> None:
    assert not families()[name].stacks


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("stacked", [True, False])
def test_a_state_is_all_that_the_next_steps_depend_on(optimizer: str, stacked: bool) -> None:
    task = Task((8,), 3)
    seeds = [0, 1, 2] if stacked else [0]
    trainings = [Training(batch_rows=16, optimizer=optimizer, learning_rate=RATES[seed]) for seed in seeds]
    rows = data(task)

    def learners(start: int) -> Learners:
        models = [build(seed + start, task, widths=(16,)) for seed in seeds]
        return Stack(MLP, models, trainings) if stacked else Single(MLP, models[0], trainings[0])

    first = learners(0)
    train(first, rows, seeds, trainings[0])
    states = [first.state(number) for number in range(len(seeds))]
    train(first, rows, seeds, trainings[0], steps=7)
    other = learners(100)
    other.restore(states)
    train(other, rows, seeds, trainings[0], steps=7)
    for number in range(len(seeds)):
        left, right = first.state(number), other.state(number)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)
        assert not torch.equal(*[next(iter(one.values())) for one in (left, states[number])])


def test_a_shown_module_is_not_the_one_that_learns() -> None:
    task = Task((8,), 3)
    rows = data(task)
    for kind in ("stack", "single"):
        model = build(0, task, widths=(16,))
        learners = Stack(MLP, [model], [Training()]) if kind == "stack" else Single(MLP, model, Training())
        state = learners.state(0)
        before = {name: value.clone() for name, value in learners.module(state).state_dict().items()}
        train(learners, rows, [0], Training(), steps=3)
        assert all(torch.equal(before[name], value) for name, value in learners.module(state).state_dict().items())
