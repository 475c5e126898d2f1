"""Memory that batches free: kept for the next ones while a task lasts, given back behind it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pipeline import allocator
from pipeline.allocator import freed_memory_kept, give_back_freed_memory, keep_freed_memory
from pipeline.executor import InlineExecutor

# an operation's result of 64 MiB, 10 times in each of three phases: pages that the system cleared, and MiB held behind
CODE = """
import resource
import torch
from pipeline.allocator import freed_memory_kept

def cleared():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(64 << 18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def held():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() >> 20

torch.ones(64 << 18)
first, before = cleared(), held()
with freed_memory_kept():
    # a small object behind a block may keep the next ones from its place: some more are begun before all fits
    for _ in range(8):
        if cleared() < 10:
            break
    within, kept = cleared(), held()
print(first, within, cleared(), before, kept, held())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_is_kept_within_the_block_and_given_back_behind_it() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    first, within, behind, before, kept, after = map(int, done.stdout.split())
    # large pages or not: each of ten blocks anew, or none
    assert first >= 10
    assert within < 10
    assert behind >= 10
    assert kept >= before + 60
    assert after <= before + 10


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_a_task_leaves_its_memory_to_the_next_until_the_last_is_done() -> None:
    give_back_freed_memory()
    with freed_memory_kept(), freed_memory_kept():
        pass
    assert not allocator._keeping
    keep_freed_memory()
    with freed_memory_kept():
        pass
    assert allocator._keeping, "a block within is no end"

    def task(number: int) -> bool:
        before = allocator._keeping
        keep_freed_memory()
        return before

    give_back_freed_memory()
    assert list(InlineExecutor().map(task, range(3))) == [(0, False), (1, True), (2, True)]
    assert not allocator._keeping
