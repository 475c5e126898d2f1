"""Progress of a run on stderr: bars on a terminal, otherwise a plain line now and then.

Layer 5: shows what it is told; implements `pipeline.progress.Progress`.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

# a log keeps a line for each of these
PLAIN_INTERVAL_S = 10.0


class Bars:
    """A bar for each stage; a context manager, so that the terminal is always given back as it was."""

    def __init__(self, console: Console) -> None:
        self._bars = Progress(
            TextColumn("{task.description:>8}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self._current: TaskID | None = None

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def stage(self, name: str, total: int, done: int) -> None:
        """Begin a bar."""
        self._stop_current()
        self._current = self._bars.add_task(name, total=total, completed=done)

    def advance(self, count: int) -> None:
        """Move the current bar."""
        if self._current is not None:
            self._bars.advance(self._current, count)

    def note(self, text: str) -> None:
        """Print above the bars."""
        self._bars.console.print(text, markup=False, highlight=False)

    def _stop_current(self) -> None:
        if self._current is not None:
            self._bars.stop_task(self._current)


class Lines:
    """A line when a stage begins and ends, and every PLAIN_INTERVAL_S in between."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._name = ""
        self._total = self._done = 0
        self._began_s = self._said_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing was changed that had to be put back."""

    def stage(self, name: str, total: int, done: int) -> None:
        """Say what begins."""
        self._name, self._total, self._done = name, total, done
        self._began_s = time.monotonic()
        self._say(f"{done} of {total} stored before" if done else f"{total} to do")

    def advance(self, count: int) -> None:
        """Say how far it is, if the stage is over or the last line is long ago."""
        self._done += count
        now = time.monotonic()
        if self._done >= self._total:
            self._say(f"{self._done} of {self._total} in {now - self._began_s:.1f} s")
        elif now - self._said_s >= PLAIN_INTERVAL_S:
            self._say(f"{self._done} of {self._total}")

    def note(self, text: str) -> None:
        """Print the note."""
        self._console.print(text, markup=False, highlight=False)

    def _say(self, text: str) -> None:
        self._said_s = time.monotonic()
        self.note(f"{self._name}: {text}")


def terminal_progress(console: Console) -> Bars | Lines:
    """Bars if a person is watching, else lines."""
    return Bars(console) if console.is_terminal else Lines(console)
