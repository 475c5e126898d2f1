"""Libraries compiled at first need: on the disk before they are found, and made anew where they do not load."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from pipeline import compiler
from pipeline.kernels import native_build
from pipeline.rows.native import library

KEPT = {"KEPT": 41}


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where libraries are kept, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "neuron-census"


@pytest.fixture
def source(tmp_path: Path) -> str:
    """A small library."""
    path = tmp_path / "answer.cpp"
    path.write_text('extern "C" double answer(double x) { return x * KEPT + 1; }')
    return str(path)


def load(source: str) -> ctypes.CDLL:
    return compiler.loaded(source, constants=KEPT, processor="DEFAULT")


def answered(library: ctypes.CDLL) -> float:
    library.answer.argtypes, library.answer.restype = [ctypes.c_double], ctypes.c_double
    found: float = library.answer(1.0)
    return found


def truncated(source: str, *, constants: Mapping[str, int], processor: str) -> Path:
    """A compiled library, cut to nothing before this process has loaded it: what it has, it does not open again."""
    path = Path(compiler.compiled(source, constants=constants, processor=processor))
    path.write_bytes(b"")
    return path


def test_a_truncated_library_is_compiled_anew(source: str, cache: Path) -> None:
    path = truncated(source, constants=KEPT, processor="DEFAULT")
    assert answered(load(source)) == 42
    assert list(cache.iterdir()) == [path]
    assert path.stat().st_size > 0


def test_without_a_compiler_a_truncated_library_is_a_reason(
    source: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truncated(source, constants=KEPT, processor="DEFAULT")
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "compilers", lambda: [["false"]])
        with pytest.raises(compiler.CompilerError, match="false failed"):
            load(source)
    assert answered(load(source)) == 42


def test_what_never_loads_is_compiled_twice_and_a_reason(
    source: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = cache.parent / "calls"
    script = cache.parent / "compile"
    # the last argument is where the library goes
    script.write_text(f'#!/bin/sh\necho called >> {calls}\nfor made; do :; done\n: > "$made"\n')
    script.chmod(0o755)
    monkeypatch.setattr(compiler, "compilers", lambda: [[str(script)]])
    with pytest.raises(compiler.CompilerError, match=rf"{re.escape(str(cache))}/answer-\w+\.so: file too short"):
        load(source)
    assert calls.read_text().splitlines() == ["called"] * 2
    assert "file too short" in str(native_build.kernel.__wrapped__())
    assert library.__wrapped__() is None


def test_rows_have_their_library_after_it_was_truncated(cache: Path) -> None:
    truncated("rows/cpp/padding.cpp", constants={}, processor=torch.backends.cpu.get_cpu_capability())
    assert library.__wrapped__() is not None


@pytest.mark.slow
def test_the_kernel_is_native_after_it_was_truncated(cache: Path) -> None:
    capability = torch.backends.cpu.get_cpu_capability()
    truncated("kernels/cpp/kernel.cpp", constants=native_build.CONSTANTS, processor=capability)
    assert isinstance(native_build.kernel.__wrapped__(), ctypes.CDLL)


def test_a_library_is_on_the_disk_before_it_has_its_name(
    source: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, list[Path]]] = []
    fsync = os.fsync

    def noted(handle: int) -> None:
        seen.append((os.fstat(handle).st_ino, list(cache.glob("*.so"))))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    load(source)
    (path,) = cache.glob("*.so")
    assert seen == [(path.stat().st_ino, [])]
