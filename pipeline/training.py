"""The train task: fit recipes that may train together and store their checkpoints, create-only.

Layer 3. What a checkpoint holds is a function of its recipe and the data, never of the group, the worker, or how often
the training was interrupted: it goes on from the last checkpoint, beside which everything is kept that the next step
depends on. A GPU adds in other orders than a CPU: of a recipe those weights count that are stored first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import torch

from pipeline.devices import CPU, GPU, device_named
from pipeline.fit.loop import Diverged, Saved, fit
from pipeline.fit.recipe import Recipe
from pipeline.fit.rows import Portion
from pipeline.job_sections import DataSpec, Numerics
from pipeline.models.base import Checkpoint, checkpoint_key, decode_checkpoint, encode_checkpoint
from pipeline.numerics import in_force
from pipeline.registry import sources
from pipeline.rows.decode import UID_MASK
from pipeline.sources.base import Chunk
from pipeline.store import MissingObject, Store

# trainings of one task: more would gain little speed, and a worker's death would cost more
MOST_RECIPES = 64
# a step of eight small models takes hardly longer than a step of one: to divide them would gain nothing
FEWEST_RECIPES = 8


@dataclass(frozen=True)
class TrainTask:
    """Train recipes of one `group` on the same data, on a `device`, and store their checkpoints."""

    recipes: tuple[Recipe, ...]
    data: str
    spec: DataSpec
    chunks: tuple[Chunk, ...]
    numerics: Numerics
    device: str = CPU

    @property
    def units(self) -> int:
        """Trainings."""
        return len(self.recipes)

    @property
    def models(self) -> tuple[str, ...]:
        """Ids of the models that the task makes."""
        return tuple(recipe.model_id(step) for recipe in self.recipes for step in recipe.checkpoints)

    def parts(self) -> tuple[TrainTask, ...]:
        """A task for each training, where there are several."""
        return tuple(replace(self, recipes=(recipe,)) for recipe in self.recipes) if len(self.recipes) > 1 else ()


def grouped(recipes: Sequence[Recipe], workers: int) -> Iterator[tuple[Recipe, ...]]:
    """Recipes that may train together, in as few groups as keep every worker busy: no weight depends on it."""
    together: dict[str, list[Recipe]] = {}
    for recipe in recipes:
        together.setdefault(recipe.group, []).append(recipe)
    for group in together.values():
        size = min(MOST_RECIPES, max(FEWEST_RECIPES, -(-len(group) // workers)))
        yield from (tuple(group[start : start + size]) for start in range(0, len(group), size))


def resume_key(recipe: Recipe, step: int) -> str:
    """Where a training keeps what it needs to go on from a checkpoint, until it is done."""
    return f"training/{recipe.lineage}/{step}.safetensors"


def run_train(task: TrainTask, store: Store) -> dict[str, str]:
    """Store the checkpoints; returns the models that do not exist because their training diverged, with the reason."""
    device = device_named(task.device)
    source = sources()[task.spec.source](task.data, task.spec, store)
    portions = [
        Portion(chunk.id, chunk.rows, partial(source.read, chunk, task.numerics.batch_rows), partial(_row_of, chunk))
        for chunk in task.chunks
    ]
    made: set[str] = set()
    failed: dict[str, str] = {}
    resume = _resume(task.recipes, store)
    if resume is not None:
        made |= {recipe.model_id(step) for recipe in task.recipes for step in recipe.checkpoints if step <= resume[0]}
    with in_force(task.numerics), torch.random.fork_rng(devices=[device] if device.type == GPU else []):
        for event in fit(task.recipes, portions, resume=resume[1] if resume else None, device=device):
            recipe = task.recipes[event.recipe]
            match event:
                case Saved(step=step):
                    _store(recipe, event, store)
                    made.add(recipe.model_id(step))
                case Diverged(reason=reason):
                    ids = {recipe.model_id(step) for step in recipe.checkpoints}
                    failed |= dict.fromkeys(sorted(ids - made), reason)
    for recipe in task.recipes:
        for key in store.keys(f"training/{recipe.lineage}/"):
            store.remove(key)
    return failed


def _row_of(chunk: Chunk, uid: int) -> str:
    """What a message calls a row of a chunk to train on."""
    row = f"uid {uid}" if chunk.uid_base is None else f"row {(uid - chunk.uid_base) & UID_MASK}"
    return f"data {chunk.data}: {chunk.url}, {row} to train on"


def _store(recipe: Recipe, event: Saved, store: Store) -> None:
    # in this order: where something can be resumed from, its checkpoint is stored
    store.put_once(checkpoint_key(recipe.model_id(event.step)), encode_checkpoint(event.checkpoint))
    if 0 < event.step < recipe.steps:
        # another worker that has finished the training may remove what it finds there
        with suppress(MissingObject):
            store.put_once(resume_key(recipe, event.step), encode_checkpoint(event.resume))


def _resume(recipes: Sequence[Recipe], store: Store) -> tuple[int, list[Checkpoint]] | None:
    """The last step at which every training of the group can be taken up, and what it needs for that."""
    stored = [set(store.keys(f"training/{recipe.lineage}/")) for recipe in recipes]
    for step in reversed(recipes[0].checkpoints):
        keys = [resume_key(recipe, step) for recipe in recipes]
        if all(key in found for key, found in zip(keys, stored, strict=True)):
            try:
                return step, [decode_checkpoint(store.get(key), key=key) for key in keys]
            except MissingObject:
                # another worker has finished the training since, and what it made will be found
                return None
    return None
