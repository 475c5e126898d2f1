"""The machine that figures come from."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from pipeline.devices import CPU, GPU
from pipeline.kernels import choose, native_tiles


def machine(threads: int, device: torch.device | None = None) -> dict[str, str | int]:
    """What decides how fast it is, and when it was."""
    of_gpu: dict[str, str | int] = {}
    if device is not None and device.type == GPU:
        of_gpu = {
            "device": torch.cuda.get_device_name(device),
            "memory_gib": round(torch.cuda.get_device_properties(device).total_memory / 2**30),
            "cuda": str(torch.version.cuda),
            "triton": version("triton"),
        }
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "cpu": _processor(),
        "cores": os.cpu_count() or 1,
        "threads": threads,
        "torch": torch.__version__,
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "matrix_unit": "none" if native_tiles.kernel() is None else "AMX",
        "kernel": choose.name(GPU if of_gpu else CPU),
        "python": platform.python_version(),
        "system": platform.system(),
        **of_gpu,
    }


def _processor() -> str:
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
