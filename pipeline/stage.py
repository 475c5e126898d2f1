"""One stage of a run: all its tasks to the end, what failed by its input, and what is left open and why.

Layer 4. What one poisoned chunk or model breaks, it breaks alone: a task that is lost is cut into smaller ones until
the smallest is lost, everything else is done, and the run stays open for that one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.executor import Executor, Lost
from pipeline.progress import Progress
from pipeline.task import Receipt, Task, kind_of

# where a task stands in the plan; a part of one stands behind the number of the whole
Place = tuple[int, ...]


@dataclass(frozen=True)
class Stage:
    """What became of a stage's tasks: receipts in plan order, then models with reasons.

    failed  models that failed by themselves: the same in every run
    unread  models with rows that cannot be read, which the owner of the data must act on
    spoilt  models with a stored object that is not what it should be, which the operator must act on
    lost    models whose tasks came to nothing, which another run may do
    """

    receipts: tuple[Receipt, ...]
    failed: Mapping[str, str]
    unread: Mapping[str, str]
    spoilt: Mapping[str, str]
    lost: Mapping[str, str]

    @property
    def open(self) -> frozenset[str]:
        """Models that are neither done nor failed by themselves."""
        return frozenset(self.unread.keys() | self.spoilt.keys() | self.lost.keys())

    def then(self, later: Stage) -> Stage:
        """This stage and one that came after it; the earlier reason stays."""
        return Stage(
            self.receipts + later.receipts,
            {**later.failed, **self.failed},
            {**later.unread, **self.unread},
            {**later.spoilt, **self.spoilt},
            {**later.lost, **self.lost},
        )


def run_stage(do: Callable[[Task], Receipt], tasks: Iterable[Task], *, executor: Executor, progress: Progress) -> Stage:
    """Run tasks, and the parts of those that are lost, until nothing smaller is left to try."""
    receipts: list[tuple[Place, Receipt]] = []
    said: set[str] = set()
    waiting: list[tuple[Place, Task]] = [((number,), task) for number, task in enumerate(tasks)]
    while waiting:
        parts: list[tuple[Place, Task]] = []
        for number, outcome in executor.map(do, [task for _, task in waiting]):
            place, task = waiting[number]
            smaller: Sequence[Task] = task.parts()
            if smaller and _came_to_nothing(outcome):
                parts += [((*place, index), part) for index, part in enumerate(smaller)]
            elif isinstance(outcome, Lost):
                receipts.append((place, Receipt(kind_of(task), 0, lost=dict.fromkeys(task.models, outcome.reason))))
                progress.note(f"lost: {outcome.reason}")
            else:
                receipts.append((place, outcome))
                progress.advance(outcome.units)
                for remark in sorted(set(outcome.remarks) - said):
                    progress.note(remark)
                said |= set(outcome.remarks)
        waiting = parts
    return _stage([receipt for _, receipt in sorted(receipts, key=lambda one: one[0])])


def _came_to_nothing(outcome: Receipt | Lost) -> bool:
    """Whether nothing of a task was done, which one of its models, or what is stored of it, may be the reason for."""
    return isinstance(outcome, Lost) or bool(outcome.spoilt or outcome.lost)


def _stage(receipts: Sequence[Receipt]) -> Stage:
    # of several reasons the first in plan order, which neither the number of workers nor a resumption can change
    last_first = receipts[::-1]
    failed = {model: reason for receipt in last_first for model, reason in receipt.failed.items()}
    unread = {model: reason for receipt in last_first for model, reason in receipt.unread.items()}
    spoilt = {model: reason for receipt in last_first for model, reason in receipt.spoilt.items()}
    lost = {model: reason for receipt in last_first for model, reason in receipt.lost.items()}
    return Stage(tuple(receipts), failed, unread, spoilt, lost)
