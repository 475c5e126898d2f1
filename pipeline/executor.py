"""Where tasks run: the contract of an executor, and the one that runs them here.

Layer 1: knows nothing of what a task is. An executor maps a function over tasks; it may run them anywhere, in any
order, twice or after a crash, because every task stores its result create-only under a key that its input decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from pipeline.allocator import give_back_freed_memory
from pipeline.errors import breaks_the_process, is_machines_fault

Task = TypeVar("Task")
Receipt = TypeVar("Receipt")


@dataclass(frozen=True)
class Lost:
    """In place of a receipt: why the last of the tries that a task was allowed came to nothing."""

    reason: str


class Executor(Protocol):
    """Runs tasks; `workers` is how many can run at a time, for grouping and progress only.

    Behind the last task of a map no worker keeps memory that is free.
    """

    @property
    def workers(self) -> int:
        """How many tasks run at a time."""
        ...

    def map(self, function: Callable[[Task], Receipt], tasks: Sequence[Task]) -> Iterator[tuple[int, Receipt | Lost]]:
        """Yield for every task, as they finish, its number and its receipt; a CensusError of a task is raised here."""
        ...


class InlineExecutor:
    """Runs each task in this process, in order; what it raises is raised here, but by a machine's fault it is lost."""

    workers = 1

    def map(self, function: Callable[[Task], Receipt], tasks: Sequence[Task]) -> Iterator[tuple[int, Receipt | Lost]]:
        """Yield the number and the receipt of each task in the order given."""
        try:
            broken: Lost | None = None
            for number, task in enumerate(tasks):
                outcome, breaks = (broken, True) if broken else _outcome(function, task)
                broken = outcome if breaks and isinstance(outcome, Lost) else None
                yield number, outcome
        finally:
            give_back_freed_memory()


def _outcome(function: Callable[[Task], Receipt], task: Task) -> tuple[Receipt | Lost, bool]:
    """What comes of a task, and whether this process can do no more."""
    try:
        return function(task), False
    except Exception as error:
        if is_machines_fault(error):
            said = f"this machine could not: {type(error).__name__}: {' '.join(str(error).split())}"
            return Lost(said), breaks_the_process(error)
        raise
