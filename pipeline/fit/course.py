"""How the training of one model has gone: its curve, its best weights so far, whether it has ended.

Layer 2: no storage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import Any

from pipeline.fit.learners import State

# points of a loss curve, each the mean of the steps since the last
CURVE_POINTS = 200


@dataclass(eq=False)
class Course:
    """The course of one training.

    curve     (step, quantity, value): the "loss" as the mean since the point before, "learning_rate", "held_out_loss"
    noted     the step of its last point
    best      the state with the least held-out loss, and `best_loss`
    looks     looks at the held-out rows since then
    stopped   the step at which it ended early
    diverged  why it has no weights any more
    """

    curve: list[tuple[int, str, float]] = field(default_factory=list)
    noted: int = 0
    best: State | None = None
    best_loss: float = inf
    looks: int = 0
    stopped: int | None = None
    diverged: str | None = None

    @property
    def going(self) -> bool:
        """Whether its next steps matter."""
        return self.stopped is None and self.diverged is None

    def note(self, step: int, total: float, rate: float) -> None:
        """Add a point: the sum of the losses since the last one. One that is not finite ends the training."""
        if not isfinite(total):
            first = self.noted + 1
            when = f"at step {step}" if first == step else f"between steps {first} and {step}"
            self.diverged = f"diverged: the loss was not finite {when}"
            return
        self.curve += [(step, "loss", total / (step - self.noted)), (step, "learning_rate", rate)]
        self.noted = step

    def look(self, step: int, loss: float, state: State, patience: int) -> None:
        """Note the held-out loss; without a new least one for `patience` looks the training ends."""
        if isfinite(loss):
            self.curve.append((step, "held_out_loss", loss))
        if loss < self.best_loss:
            self.best, self.best_loss, self.looks = state, loss, 0
            return
        self.looks += 1
        if self.looks >= patience:
            self.stopped = step

    def record(self) -> dict[str, Any]:
        """Everything but the best state, as JSON values."""
        values = {name: value for name, value in vars(self).items() if name != "best"}
        loss = None if self.best_loss == inf else self.best_loss
        return {**values, "best_loss": loss, "curve": list(self.curve)}

    @classmethod
    def of(cls, record: Mapping[str, Any], best: State) -> Course:
        """The course that a record was made of."""
        loss = inf if record["best_loss"] is None else record["best_loss"]
        curve = [(step, quantity, value) for step, quantity, value in record["curve"]]
        return cls(**{**record, "best_loss": loss, "curve": curve}, best=best or None)
