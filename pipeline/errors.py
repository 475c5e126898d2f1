"""The errors a person can act on. The type says who must act; the message says what, where and what was expected.

Layer 0: imports nothing of the pipeline. Everything else that escapes a task is a defect and keeps its traceback.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class CensusError(Exception):
    """An error that a person can act on; shown as one message, without a traceback, and told by the exit code."""

    exit_code = 2


class JobError(CensusError):
    """The job file asks for something that does not exist or cannot be: its submitter must act."""


class DataError(CensusError):
    """A data set is missing, unreadable, changed under the run, or of another schema: its owner must act."""


class MissingData(DataError):  # noqa: N818
    """There is nothing where a data set, or a part of it, should be."""


class ModelError(CensusError):
    """A model cannot be built, loaded, run or interpreted: its author must act."""


class ContractError(CensusError):
    """A statistic, family or source is not what its contract asks for: who wrote it must act."""


class StoreError(CensusError):
    """The store cannot be read or written, or holds what it should not: the operator must act."""


class SpoiltObject(StoreError):  # noqa: N818
    """A stored object is damaged, or is not of what stands beside it: whatever needs it waits for the operator."""


class Unfinished(CensusError):  # noqa: N818
    """Tasks came to nothing though their input is not at fault: the run stays open, and the same run goes on there."""

    exit_code = 1


# torch's classes of what a machine lacks; what is said without one: by its allocator of CPUs, C++, oneDNN, and a GPU's
# libraries. An index out of range on a GPU is among them: it breaks its process, where everything fails then
_OF_MACHINES = ("OutOfMemoryError", "AcceleratorError")
_SAID_BY_MACHINES = (
    "DefaultCPUAllocator: ",
    "std::bad_alloc",
    "could not create a memory object",
    "CUDA error: ",
    "cuDNN error: ",
    "cusolver error: ",
)


def is_machines_fault(error: BaseException) -> bool:
    """Whether memory was short, or a GPU failed: no fault of the model or the data, elsewhere the same may do.

    >>> is_machines_fault(MemoryError()), is_machines_fault(RuntimeError("shapes differ"))
    (True, False)
    """
    if isinstance(error, MemoryError) or any(one.__name__ in _OF_MACHINES for one in type(error).__mro__):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _SAID_BY_MACHINES)


def breaks_the_process(error: BaseException | None) -> bool:
    """Whether a process that raised this can do no more: an error of a GPU comes again whatever is asked of it."""
    return any(one.__name__ == "AcceleratorError" for one in type(error).__mro__)


class Mistakes:
    """Mistakes in a job, noted one after the other so that all of them are said at once."""

    def __init__(self, said: Iterable[str] = ()) -> None:
        self._said = list(said)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note a JobError instead of raising it."""
        try:
            yield
        except JobError as error:
            self._said.append(str(error))

    def refuse(self) -> None:
        """Raise one JobError with all that was noted, each once, if anything was."""
        if self._said:
            raise JobError("\n".join(dict.fromkeys(self._said)))


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which known names are meant, nearest first.

    >>> nearest("tamplate", ["match", "template"])
    "did you mean 'template'? known: match, template"
    """
    names = sorted(known)
    return closest(name, names) + (f"known: {', '.join(names)}" if names else "none is known")


def closest(name: str, known: Iterable[str]) -> str:
    """Ask whether the nearest of the known names is meant; nothing where none is near.

    >>> closest("god.parquet", ["bad.txt", "good.parquet"]), closest("x", ["good.parquet"])
    ("did you mean 'good.parquet'? ", '')
    """
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'? " if close else ""
