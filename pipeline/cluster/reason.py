"""What Ray's errors come to, in one line.

Layer 5.
"""

from __future__ import annotations

import ray


def last_line(error: BaseException) -> str:
    """The line of Ray's long messages that says what happened."""
    cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else None
    text = f"{type(cause).__name__}: {cause}" if cause is not None else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1 if cause is None and "Traceback" in text else 0].rstrip(".")
