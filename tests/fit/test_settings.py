from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.optim import SGD, lr_scheduler

from pipeline.fit.schedule import share_of_rate
from pipeline.fit.settings import Training


@pytest.mark.parametrize(
    ("given", "place", "said"),
    [
        ({"optimiser": "sgd"}, "optimiser", "Extra inputs are not permitted"),
        ({"steps": 10, "warmup_steps": 11}, "warmup_steps", "at most steps = 10"),
        ({"schedule": "step"}, "decay_steps", "steps in rising order with schedule = 'step'"),
        ({"decay_steps": (5,)}, "decay_steps", "and none without"),
        ({"steps": 10, "checkpoints": (5, 5)}, "checkpoints", "rising order between 0 and steps = 10"),
        ({"steps": 10, "checkpoints": (10,)}, "checkpoints", "rising order between 0 and steps = 10"),
        ({"steps": 10, "checkpoints": (0, 3)}, "checkpoints", "rising order"),
        ({"patience": 3}, "patience", "held_out above 0"),
        ({"learning_rate": 0.0}, "learning_rate", "greater than 0"),
    ],
)
def test_what_does_not_fit_is_refused_at_its_place(given: dict[str, Any], place: str, said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Training(**given)
    (error,) = caught.value.errors()
    assert error["loc"] == (place,)
    assert said in error["msg"]


def test_a_validated_table_reads_itself_back() -> None:
    first = Training(steps=30, checkpoints=(3, 9), schedule="step", decay_steps=(10, 20))
    assert Training(**first.model_dump(mode="json")) == first


def torchs_rates(make: Any, steps: int) -> list[float]:
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("training", "torchs"),
    [
        ({}, lambda o: lr_scheduler.ConstantLR(o, factor=1.0)),
        ({"schedule": "cosine"}, lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=20)),
        (
            {"schedule": "step", "decay_steps": (5, 11), "decay": 0.3},
            lambda o: lr_scheduler.MultiStepLR(o, [5, 11], gamma=0.3),
        ),
        ({"warmup_steps": 4}, lambda o: lr_scheduler.LambdaLR(o, lambda step: min(1.0, (step + 1) / 4))),
    ],
)
def test_schedules_are_torchs(training: dict[str, Any], torchs: Any) -> None:
    settings = Training(steps=20, **training)
    ours = [share_of_rate(settings, step) for step in range(1, 21)]
    assert ours == pytest.approx(torchs_rates(torchs, 20), rel=1e-12, abs=1e-15)


def test_cosine_begins_where_the_warm_up_ends() -> None:
    settings = Training(steps=20, schedule="cosine", warmup_steps=5)
    shares = [share_of_rate(settings, step) for step in range(1, 21)]
    assert shares[:6] == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]
    assert shares[5:] == sorted(shares[5:], reverse=True)
    assert 0 < shares[-1] < 0.02
