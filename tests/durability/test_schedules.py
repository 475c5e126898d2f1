"""Two hundred random schedules of faults: each ends with one commit and the bytes of the undisturbed run.

`pytest -k "schedule and 137"` replays seed 137. CI plays the first SAMPLE seeds, `make test-all` every one.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.durability.schedules import check, play, tiny_job
from tests.durability.world import World

SEEDS = 200
SAMPLE = 40


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=[] if seed < SAMPLE else pytest.mark.slow) for seed in range(SEEDS)]
)
def test_schedule(seed: int, directory: Path) -> None:
    world = World()
    try:
        check(play(seed, tiny_job(directory), world), directory)
    except Exception as error:
        story = "\n".join(world.history)
        raise AssertionError(f"seed {seed} replays this:\n{story}\n{type(error).__name__}: {error}") from error
