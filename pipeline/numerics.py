"""Put a job's numerics in force around a piece of work: what makes the same inputs give the same bytes.

Layer 1. Threads, determinism and tf32 change the last bits of float32 sums, so they are part of a job and of every key.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipeline.job_sections import Numerics


@contextmanager
def in_force(numerics: Numerics) -> Iterator[None]:
    """Set threads, deterministic kernels and tf32 for the block, and put back what was there."""
    threads = torch.get_num_threads()
    debug_mode = torch.get_deterministic_debug_mode()
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    fills = torch._C._get_deterministic_fill_uninitialized_memory()
    torch.set_num_threads(numerics.threads)
    # use_deterministic_algorithms() is the same setting, but its first call imports the whole compiler (3 s)
    torch.set_deterministic_debug_mode("warn" if numerics.deterministic else "default")
    # with deterministic kernels torch writes NaN into whatever is allocated, a launch each on a GPU: to find bugs by
    torch._C._set_deterministic_fill_uninitialized_memory(False)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = numerics.tf32
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_deterministic_debug_mode(debug_mode)
        torch._C._set_deterministic_fill_uninitialized_memory(fills)
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
