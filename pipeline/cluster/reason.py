"""What Ray's errors come to, in one line.

Layer 5.
"""

from __future__ import annotations

import re

import ray

# a frame of a printed traceback: of a file, not of what a library made up or compiled
_FRAME = re.compile(r'^\s*File "(?P<file>/[^"]+\.py)", line (?P<line>\d+)', re.MULTILINE)
_INSTALLED = re.compile(r".*/(site|dist)-packages/|.*/lib(32|64)?/python3[^/]*/")


def last_line(error: BaseException) -> str:
    """The line of Ray's long messages that says what happened, and where in the code if it is a defect of a task."""
    cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else None
    text = f"{type(cause).__name__}: {cause}" if cause is not None else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = (lines or [type(error).__name__])[-1 if cause is None and "Traceback" in text else 0].rstrip(".")
    return said + (_place(str(error).removesuffix(str(cause))) if cause is not None else "")


def _place(traceback: str) -> str:
    """The innermost line of our code or of a model's, in brackets; what they call is no place to look."""
    own = [(file, line) for file, line in map(_shortened, _FRAME.finditer(traceback)) if file]
    return f" ({own[-1][0]}:{own[-1][1]})" if own else ""


def _shortened(frame: re.Match[str]) -> tuple[str, str]:
    """A frame's file as a person would look for it, empty if it is of a library; and the line."""
    file, line = frame["file"], frame["line"]
    below = _INSTALLED.sub("", file)
    return below if below == file or below.startswith("pipeline/") else "", line
