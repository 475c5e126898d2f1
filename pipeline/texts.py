"""What the files of statistics and families said when this process imported them: rows are named by it.

Layer 1. A file that is edited while a process runs does not change what the process computes, nor what it says of it;
and a worker that has imported another text than the driver refuses the task.
"""

from __future__ import annotations

import importlib
import inspect
import socket
from collections.abc import Iterable, Mapping
from functools import cache

from pipeline.errors import ContractError
from pipeline.hashing import sha256


@cache
def text_of(module: str) -> str:
    """Digest of a module's text as this process first saw it, which imports it; empty where there is none to read."""
    try:
        return sha256(inspect.getsource(importlib.import_module(module)).encode())[:16]
    except (ImportError, OSError, TypeError):  # installed without its text, or typed at a prompt
        return ""


def texts_of(things: Iterable[object]) -> dict[str, str]:
    """The digests of the modules that the things' classes are of, by module."""
    return {module: text_of(module) for module in sorted({type(one).__module__ for one in things})}


def refuse_other_texts(texts: Mapping[str, str]) -> None:
    """ContractError where a module has another text here than where a task was made."""
    for module, expected in texts.items():
        if text_of(module) != expected:
            raise ContractError(
                f"{module.replace('.', '/')}.py has another text on {socket.gethostname()} than where the run began: "
                "give every machine the same, leave it alone until the run has ended, and run again"
            )
