"""Files that are there whole or not at all, in directories that keep their names when the power goes.

Layer 1: `os` and `pathlib` alone; what the files are, `store.py` knows.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable
from pathlib import Path

# the name of a file that never got its own
DRAFT = r"\.[0-9a-f]{32}"


def write_whole(target: Path, content: bytes) -> bool:
    """Write a file that is on the disk before it has its name; False if another has the name."""
    draft = target.with_name(f".{uuid.uuid4().hex}")
    try:
        with open(draft, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.link(draft, target)
        return True
    except FileExistsError:
        return False
    finally:
        draft.unlink(missing_ok=True)


def make_directories(path: Path, changed: dict[Path, None]) -> None:
    """Make a directory and those above it; note in `changed` which of them have other names in them now."""
    if not path.is_dir():
        make_directories(path.parent, changed)
        path.mkdir(exist_ok=True)
        changed[path.parent] = None


def sync(paths: Iterable[Path]) -> None:
    """Make safe what is in these files, and which names are in these directories."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
