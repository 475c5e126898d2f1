"""The steps of a training, from its beginning or from where it was interrupted, and the checkpoints they pass.

Layer 2: no storage. What it yields is a function of recipe and rows alone: not of the group, nor of interruptions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import ceil, isfinite
from typing import Any

import torch
from torch import nn

from pipeline.fit.course import CURVE_POINTS, Course
from pipeline.fit.learners import Learners, Single, Stack, State, below, can_stack
from pipeline.fit.material import Material
from pipeline.fit.objective import scores
from pipeline.fit.recipe import Recipe
from pipeline.fit.rows import SAMPLE_ROWS, Portion
from pipeline.fit.schedule import share_of_rate
from pipeline.hashing import splitmix64
from pipeline.models.base import Checkpoint
from pipeline.models.norms import reestimated

CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Saved:
    """Recipe number `recipe` of the group after `step` steps, and what its training needs to go on from there."""

    recipe: int
    step: int
    checkpoint: Checkpoint
    resume: Checkpoint


@dataclass(frozen=True)
class Diverged:
    """Recipe number `recipe` of the group has no finite weights any more; what it had before has been yielded."""

    recipe: int
    reason: str


def fit(
    recipes: Sequence[Recipe],
    portions: Sequence[Portion],
    *,
    resume: Sequence[Checkpoint] | None = None,
    device: torch.device = CPU,
) -> Iterator[Saved | Diverged]:
    """Train recipes of one `group`, from the beginning or on from an object of each at the same step.

    Seeds torch's default generators: initialisation (on the CPU, wherever it learns) and dropout draw from them.
    """
    training = _Fit(recipes, portions, device)
    if resume is None:
        yield from training.saved(0)
        start = 0
    else:
        start = training.restore(resume)
    yield from training.run(start)
    for number, course in enumerate(training.courses):
        if course.diverged is not None:
            yield Diverged(number, course.diverged)


class _Fit:
    def __init__(self, recipes: Sequence[Recipe], portions: Sequence[Portion], device: torch.device) -> None:
        self.recipes, self.device = recipes, device
        self.settings, self.family = recipes[0].settings, recipes[0].kind
        # half precision is for measuring: weights soon cease to move in it
        self.dtype = torch.float64 if recipes[0].dtype == "float64" else torch.float32
        seeds = [recipe.seed for recipe in recipes]
        self.material = Material(self.family, self.settings, portions, seeds=seeds, device=device, dtype=self.dtype)
        self.courses = [Course() for _ in recipes]
        self.learners = self._learners()

    def run(self, start: int) -> Iterator[Saved]:
        """Take the steps behind `start`, which is a checkpoint."""
        settings, every = self.settings, ceil(self.settings.steps / CURVE_POINTS)
        total_G = torch.zeros(len(self.recipes), dtype=torch.float64, device=self.device)
        for step, (window, index_GN) in enumerate(self.material.draws(start), start=start + 1):
            loss_G = self.learners.losses(window, index_GN)
            if settings.clip_norm is not None:
                self.learners.clip(settings.clip_norm)
            self.learners.update(share_of_rate(settings, step))
            total_G += loss_G
            saves = step in self.recipes[0].checkpoints
            if saves or step % every == 0:
                self._note(total_G, step)
            if settings.patience and (step % settings.evaluate_steps == 0 or step == settings.steps):
                self._look(step, settings.patience)
            if saves:
                yield from self.saved(step)
            if step == settings.steps or not any(course.going for course in self.courses):
                break
        # of trainings that ended early, the checkpoints still to come are what they ended with
        for later in self.recipes[0].checkpoints:
            if later > step:
                yield from self.saved(later)

    def saved(self, step: int) -> Iterator[Saved]:
        """The checkpoints of every recipe that has not diverged."""
        for number, course in enumerate(self.courses):
            if course.diverged is not None:
                continue
            state = self.learners.state(number)
            ended = course.stopped is not None or step == self.settings.steps
            module = self.learners.module(course.best if ended and course.best else state)
            if step == 0:
                module = reestimated(module, self.material.scored, rows=SAMPLE_ROWS)
            record = self._record(number, module, step)
            if course.diverged is None:
                weights = {name: value.detach().to(CPU, copy=True) for name, value in module.state_dict().items()}
                yield Saved(number, step, Checkpoint(weights, record), _resume(state, course, step))

    def restore(self, resume: Sequence[Checkpoint]) -> int:
        """Take over what an earlier training left; its step."""
        self.learners.restore([below(one.weights, "state") for one in resume])
        self.courses = [Course.of(one.record["course"], below(one.weights, "best")) for one in resume]
        return int(resume[0].record["step"])

    def _record(self, number: int, module: nn.Module, step: int) -> dict[str, Any]:
        course = self.courses[number]
        found = scores(self.family, module, self.material.scored)
        if not isfinite(found["loss"]):
            course.diverged = f"diverged: its loss is {found['loss']} after step {step}"
        return {
            "recipe": asdict(self.recipes[number]),
            "step": step,
            "train_accuracy": found.pop("accuracy"),
            "train_loss": found.pop("loss"),
            "train_scores": found,
            "curve": list(course.curve),
            "stopped": course.stopped,
        }

    def _note(self, total_G: torch.Tensor, step: int) -> None:
        share = share_of_rate(self.settings, step)
        for recipe, course, total in zip(self.recipes, self.courses, total_G.tolist(), strict=True):
            if course.going:
                course.note(step, total, recipe.settings.learning_rate * share)
        total_G.zero_()

    def _look(self, step: int, patience: int) -> None:
        for number, course in enumerate(self.courses):
            if course.going:
                state = self.learners.state(number)
                loss = scores(self.family, self.learners.module(state), self.material.held_out)["loss"]
                course.look(step, loss, state, patience)

    def _learners(self) -> Learners:
        models = []
        for recipe in self.recipes:
            torch.manual_seed(splitmix64(recipe.seed))
            models.append(recipe.build().to(self.device, self.dtype))
        if can_stack(self.family, models[0], self.settings):
            return Stack(self.family, models, [recipe.settings for recipe in self.recipes])
        (model,) = models
        return Single(self.family, model, self.settings)


def _resume(state: State, course: Course, step: int) -> Checkpoint:
    tensors = {f"state.{name}": value for name, value in state.items()}
    tensors |= {f"best.{name}": value for name, value in (course.best or {}).items()}
    return Checkpoint(tensors, {"step": step, "course": course.record()})
