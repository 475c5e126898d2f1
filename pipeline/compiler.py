"""Compiles C++ that lies in this package, once per machine.

Layer 1. The library goes to a cache under a name that is the digest of everything it is made of, so that an old one is
never taken for a new one, and is on the disk before it has that name. Contraction is off: every operation rounds as
IEEE 754 says, whatever the compiler.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from pipeline.hashing import digest
from pipeline.whole_files import sync

OPTIONS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-fno-exceptions", "-fno-rtti", "-w")
# what torch calls the processor's vectors, and the compilers' name for such processors
PROCESSORS = {
    "AVX2": ("-march=x86-64-v3",),
    "AVX512": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
}
ZIG = "ziglang"


class CompilerError(Exception):
    """Why there is no library."""


def loaded(source: str, *, constants: Mapping[str, int], processor: str) -> ctypes.CDLL:
    """The library that `compiled` makes; what the cache holds is made anew if it does not load. Else CompilerError."""
    # one that was cut, or made where the same home is another system's
    with suppress(OSError):
        return ctypes.CDLL(compiled(source, constants=constants, processor=processor))
    try:
        return ctypes.CDLL(compiled(source, constants=constants, processor=processor, anew=True))
    except OSError as error:
        raise CompilerError(str(error)) from error


def compiled(source: str, *, constants: Mapping[str, int], processor: str, anew: bool = False) -> str:
    """The path of the library made of a C++ file and its neighbours, `source` below this package; else CompilerError.

    `constants` are defined as macros; `processor` is what `torch.backends.cpu.get_cpu_capability()` says; `anew` puts
    another in the place of the one that is there.
    """
    file = Path(__file__).parent / source
    flags = [*OPTIONS, *(f"-D{name}={value}" for name, value in constants.items())]
    flags += PROCESSORS.get(processor, ())
    sources = {path.name: path.read_text() for path in sorted(file.parent.iterdir()) if path.is_file()}
    # a home may be that of several machines
    made_of = [sources, flags, sys.platform, platform.machine(), bool(find_spec(ZIG))]
    path = _cache() / f"{file.stem}-{digest(made_of, length=16)}.so"
    if anew or not path.exists():
        try:
            _compile(file, flags, path)
        except OSError as error:
            raise CompilerError(str(error)) from error
    return str(path)


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "neuron-census"
    except RuntimeError as error:
        # a container may run as a user that it does not know
        raise CompilerError(f"{error} Set HOME or XDG_CACHE_HOME, where the compiled kernel is kept.") from error


def compilers() -> list[list[str]]:
    """The commands that may compile, the likeliest first."""
    # a whole compiler as a Python package, whose code is the fastest; as `c++` it would first build a library for C++
    package = [[sys.executable, "-m", ZIG, "cc"]] if find_spec(ZIG) else []
    before, after = (
        [[path] for name in names if (path := shutil.which(name))]
        for names in ([os.environ.get("CXX", "")], ["c++", "g++", "clang++"])
    )
    return [*before, *package, *after]


def _spelt(compiler: list[str], flags: list[str]) -> list[str]:
    """The flags as a compiler wants them."""
    if ZIG not in compiler:
        return flags
    # it takes seconds to make the run-time library that it would link, and Python has loaded all that is missing
    alone = ["-nostdlib"] if sys.platform == "linux" else []
    return [flag.replace("x86-64-v", "x86_64_v") for flag in flags] + alone


def _compile(file: Path, flags: list[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    reason = f"no C++ compiler (c++, g++ or clang++, or the package {ZIG})"
    for compiler in compilers():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            command = [*compiler, *_spelt(compiler, flags), str(file), "-o", str(made)]
            # Zig's own cache, 50 MB, goes with the folder
            environment = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": folder}
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode == 0:
                sync([made])
                # in one step: other processes may be doing the same
                made.replace(path)
                return
            reason = f"{' '.join(compiler)} failed: {done.stderr.strip()[-500:]}"
    raise CompilerError(reason)
