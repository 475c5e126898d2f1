"""The models of a run: each by its id, name and origin, twins that are the same counted once.

Layer 3.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace

from pipeline.fit.recipe import Recipe
from pipeline.foreign.origin import Untrained
from pipeline.job import Job, place_of, refusal
from pipeline.origins import Origin


@dataclass(frozen=True)
class Model:
    """One model of a run.

    step        of its training; None where that is not known
    control     id of its untrained twin
    control_of  the lineage (of several that begin alike, the first) or architecture whose twin it is
    entry       which one of the job's models stands for it: "models[0]"
    """

    id: str
    name: str
    data: str
    origin: Origin
    step: int | None
    control: str | None
    control_of: str | None
    entry: str

    @property
    def start(self) -> str | None:
        """Id of the model that it was before training; the twin of a loaded one began with other weights."""
        return self.control if isinstance(self.origin, Recipe) else None


def once(models: Iterable[Model]) -> tuple[Model, ...]:
    """The models without repeated twins: entries of one architecture share theirs, trainings that begin alike too.

    A grid of ten learning rates has one twin for each seed; which of the ten it belongs to changes none of its weights.
    """
    found: dict[Hashable, Model] = {}
    twin_of: dict[str, str] = {}
    for number, model in enumerate(models):
        first = found.setdefault(_twin(model) or number, model)
        twin_of[model.id] = first.id
    return tuple(
        replace(model, control=twin_of.get(model.control, model.control)) if model.control else model
        for model in found.values()
    )


def _twin(model: Model) -> Hashable:
    """What an untrained twin is told from others by; None for any other model."""
    match model.origin:
        case Untrained():
            return model.id
        case Recipe(beginning=beginning) if model.control_of is not None:
            return model.data, beginning
    return None


def refuse_duplicates(job: Job, models: tuple[Model, ...]) -> None:
    """JobError where two models have the same id or name."""
    for what in ("id", "name"):
        seen: dict[str, Model] = {}
        for model in models:
            other = seen.setdefault(getattr(model, what), model)
            if other is not model:
                cure = _CURES[what, isinstance(model.origin, Recipe)]
                raise refusal(job, model.entry, f"{_in_words(job, model, other, what)}: {cure}")


def _in_words(job: Job, model: Model, other: Model, what: str) -> str:
    """That two models have the same id or name, and where the job asks for the other one."""
    # nobody wrote a twin's name
    kind = "model" if model.control_of is None else "untrained twin"
    same = f"{kind} {model.name!r} has the same {what} as"
    if model.entry == other.entry:
        return f"its {same} another one of the entry" if model.name == other.name else f"its {same} {other.name!r}"
    return f"its {same} {other.name!r} of [{other.entry}], {place_of(job, other.entry)}"


_NAME = "give each entry a name of its own, name = …, with which those of its models begin"
_CURES = {
    ("id", True): "give their entries different names, seeds or settings",
    ("id", False): "they are the same weights; measure those on other data in a job of its own",
    ("name", True): f"{_NAME}, or other seeds",
    ("name", False): _NAME,
}
