"""Models trained on a GPU: to the rounding as on the CPU, to the bit as in the same training taken up again there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.devices import GPU, device_named
from pipeline.fit.loop import Saved, fit
from pipeline.fit.recipe import Recipe
from pipeline.job_sections import Numerics
from pipeline.models.base import Checkpoint, decode_checkpoint, encode_checkpoint
from pipeline.numerics import in_force
from pipeline.registry import families
from pipeline.store import open_store
from tests.census import write_job
from tests.fit.data import portions, recipe
from tests.models.build import EXAMPLES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]
EVERY = pytest.mark.parametrize("family", sorted(families()))
CPU = torch.device("cpu")


def saved(recipes: Sequence[Recipe], device: torch.device, resume: Sequence[Checkpoint] | None = None) -> list[Saved]:
    with in_force(Numerics()), torch.random.fork_rng(devices=[0]):
        events = list(fit(recipes, portions(recipes[0].family), resume=resume, device=device))
    assert all(isinstance(one, Saved) for one in events)
    return [one for one in events if isinstance(one, Saved)]


def without_dropout(family: str, **training: Any) -> Recipe:
    """A CPU and a GPU, and other precisions, drop other units."""
    drops = {"dropout": 0.0} if "dropout" in families()[family].parameters.model_fields else {}
    return recipe(family, hyperparameters=EXAMPLES[family].hyperparameters | drops, **training)


def assert_close(mine: Checkpoint, yours: Checkpoint, tolerance: float) -> None:
    for name, value in mine.weights.items():
        torch.testing.assert_close(value, yours.weights[name], rtol=tolerance, atol=tolerance)


@EVERY
def test_a_model_learns_as_on_the_cpu(family: str) -> None:
    one = without_dropout(family, steps=12)
    for mine, yours in zip(saved([one], device_named(GPU)), saved([one], CPU), strict=True):
        assert_close(mine.checkpoint, yours.checkpoint, 1e-3 if mine.step else 1e-4)


@EVERY
@pytest.mark.parametrize("precision", ["none", "bfloat16", "float16"])
def test_a_training_taken_up_again_ends_with_the_same_weights(family: str, precision: str) -> None:
    settings = {"checkpoints": (4, 9), "held_out": 0.2, "patience": 50, "evaluate_steps": 3, "clip_norm": 1.0}
    one = recipe(family, autocast=precision, schedule="cosine", **settings)
    events = saved([one], device_named(GPU))
    assert [event.step for event in events] == [0, 4, 9, 12]
    for event in events[1:3]:
        stored = decode_checkpoint(encode_checkpoint(event.resume))
        torch.cuda.manual_seed(123)
        rest = {later.step: later for later in saved([one], device_named(GPU), [stored])}
        for later in events:
            if later.step > event.step:
                assert encode_checkpoint(rest[later.step].checkpoint) == encode_checkpoint(later.checkpoint)


@EVERY
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_learns_about_the_same(family: str, precision: str) -> None:
    low, full = (
        saved([without_dropout(family, autocast=autocast)], device_named(GPU))[-1].checkpoint
        for autocast in (precision, "none")
    )
    assert not {value.dtype for value in low.weights.values()} & {torch.bfloat16, torch.float16}
    assert any(not torch.equal(value, full.weights[name]) for name, value in low.weights.items())
    for name, value in low.weights.items():
        torch.testing.assert_close(value, full.weights[name], rtol=0.1, atol=0.05)


def test_models_that_learn_together_learn_as_each_does_alone() -> None:
    recipes = [recipe(seed=seed, steps=20, learning_rate=0.05 + 0.01 * (seed % 2)) for seed in range(6)]
    together = {one.recipe: one for one in saved(recipes, device_named(GPU)) if one.step}
    for number, one in enumerate(recipes):
        assert_close(together[number].checkpoint, saved([one], device_named(GPU))[-1].checkpoint, 1e-4)


def test_a_killed_training_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    more = "[resources]\ngpus_per_worker = 1\n"
    text = write_job(tmp_path / "job.toml", seeds="0, 1, 2", more=more).read_text()
    steps = ", ".join(str(step) for step in range(500, 4000, 500))
    job = tmp_path / "job.toml"
    job.write_text(text.replace("{ steps = 30 }", f"{{ steps = 4000, checkpoints = [{steps}] }}"))

    def command(store: str) -> list[str]:
        return [
            sys.executable,
            "-m",
            "pipeline.cli",
            "run",
            str(job),
            "--store",
            str(tmp_path / store),
            "--ray",
            "none",
        ]

    subprocess.run(command("whole"), check=True, env=os.environ)
    with subprocess.Popen(command("killed"), env=os.environ) as process:
        end = time.monotonic() + 120
        while process.poll() is None and not list(tmp_path.glob("killed/training/*/1000.safetensors")):
            assert time.monotonic() < end
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    subprocess.run(command("killed"), check=True, env=os.environ)
    whole, killed = (open_store(str(tmp_path / name)) for name in ("whole", "killed"))
    keys = sorted(whole.keys("models/"))
    assert sorted(killed.keys("models/")) == keys
    for key in keys:
        assert killed.get(key) == whole.get(key)
