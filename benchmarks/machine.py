"""The machine that figures come from."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from pathlib import Path

import torch

from pipeline.kernels import choose


def machine(threads: int) -> dict[str, str | int]:
    """What decides how fast it is, and when it was."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "cpu": _processor(),
        "cores": os.cpu_count() or 1,
        "threads": threads,
        "torch": torch.__version__,
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "kernel": choose.name(),
        "python": platform.python_version(),
        "system": platform.system(),
    }


def _processor() -> str:
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
