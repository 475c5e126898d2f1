"""What tests have Ray's workers do; a light module, because every worker imports it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from pipeline import allocator
from pipeline.errors import DataError


def square(number: int) -> int:
    return number * number


def echo(content: bytes) -> bytes:
    return content


def pid(_: int) -> int:
    time.sleep(0.05)
    return os.getpid()


def keeps_memory(_: int) -> bool:
    """Keeps freed memory; says whether the task before has left it so."""
    time.sleep(0.05)
    before = allocator._keeping
    allocator.keep_freed_memory()
    return before


def gpus(_: int) -> tuple[int, str]:
    """Which GPUs a worker sees."""
    time.sleep(0.05)
    return os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES", "")


def dies_once(folder: Path, number: int) -> int:
    """Kills its worker in the middle of task 3, the first time."""
    mark = folder / str(number)
    if number == 3 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def raises_once(folder: Path, kind: str, number: int) -> tuple[int, int]:
    """Raises one of torch's errors the first time; then says which process it was, and which it is now."""
    import torch

    mark = folder / kind
    if not mark.exists():
        mark.write_text(str(os.getpid()))
        raise getattr(torch, kind)("CUDA error: uncorrectable ECC error encountered")
    return int(mark.read_text()), os.getpid()


def poisoned(number: int) -> int:
    if number == 2:
        os.kill(os.getpid(), signal.SIGSEGV)
    if number == 4:
        raise ZeroDivisionError("a defect\nof two lines")
    return number


def refused(number: int) -> int:
    raise DataError(f"file {number} is damaged")


def stalls_once(folder: Path, number: int) -> int:
    mark = folder / str(number)
    if number == 0 and not mark.exists():
        mark.touch()
        time.sleep(600)
    return number


def sleeps(folder: Path, number: int) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(600)
