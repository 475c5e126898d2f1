"""Which files are models, and their bytes.

Layer 2: storage only through `inputs`. What is read is checked against its pin before anything looks into it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from pipeline.errors import DataError, ModelError
from pipeline.foreign.spec import LoadSpec
from pipeline.inputs import InputFile, list_inputs, open_input

STATES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
PROGRAMS = (".pt2", ".onnx")
# what a transformers directory may bring: nothing that is run, and no pickle
DIRECTORY = (".json", ".txt", ".safetensors", ".model")
CONFIG = "config.json"
READ_BYTES = 1 << 20


@dataclass(frozen=True)
class ModelFiles:
    """One model: `name` tells it from the others of its entry, `files` by their name within it."""

    name: str
    files: tuple[tuple[str, InputFile], ...]

    @property
    def is_directory(self) -> bool:
        """Whether it is a transformers directory."""
        return any(name == CONFIG for name, _ in self.files)


def find_models(spec: LoadSpec, location: str) -> tuple[ModelFiles, ...]:
    """Every model at `location`, the spec's URL made absolute; DataError if there is none, or more than are pinned."""
    files = [(PurePosixPath(file.url), file) for file in list_inputs(location)]
    directories = {path.parent for path, _ in files if path.name == CONFIG}
    found = [_directory(directory, files) for directory in sorted(directories)]
    for path, file in files:
        if not directories & set(path.parents) and path.suffix in STATES + PROGRAMS:
            found.append((path.with_suffix(""), ((path.name, file),)))
    if not found:
        raise DataError(
            f"{location}: no model is there; expected a directory with {CONFIG}, or *{', *'.join(STATES + PROGRAMS)}"
        )
    if spec.sha256 is not None and len(found) > 1:
        raise DataError(f"{location}: {len(found)} models are there, and load.sha256 pins one; name its file alone")
    return tuple(
        ModelFiles(name, kept) for name, (_, kept) in zip(_names([path for path, _ in found]), found, strict=True)
    )


def _directory(
    directory: PurePosixPath, files: Sequence[tuple[PurePosixPath, InputFile]]
) -> tuple[PurePosixPath, tuple[tuple[str, InputFile], ...]]:
    inside = [(path, file) for path, file in files if path.parent == directory and path.suffix in DIRECTORY]
    return directory, tuple((path.name, file) for path, file in inside)


def _names(paths: Sequence[PurePosixPath]) -> Iterator[str]:
    """What tells the paths apart: without the directories that all of them share."""
    parts = [path.parts for path in paths]
    shared = 0
    while len(parts) > 1 and len({one[: shared + 1] for one in parts}) == 1:
        shared += 1
    for one in parts:
        yield "/".join(one[shared:] if len(parts) > 1 else one[-1:])


def sha256_of(model: ModelFiles) -> str:
    """SHA-256 of the file, or of a directory's names and files in order."""
    digests = [(name, _sha256(file)) for name, file in model.files]
    if not model.is_directory:
        return digests[0][1]
    return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in digests).encode()).hexdigest()


def _sha256(file: InputFile) -> str:
    found = hashlib.sha256()
    with open_input(file.url) as opened:
        while block := opened.read(READ_BYTES):
            found.update(block)
    return found.hexdigest()


def read_model(model: ModelFiles, sha256: str) -> Mapping[str, bytes]:
    """Its files by name; ModelError unless they are those of that SHA-256."""
    contents = {}
    for name, file in model.files:
        with open_input(file.url) as opened:
            contents[name] = opened.read()
    found = sha256_of_contents(contents)
    if found != sha256:
        raise ModelError(
            f"model {model.name}: its sha256 is {found}, expected {sha256}: the file was changed or is another"
        )
    return contents


def sha256_of_contents(contents: Mapping[str, bytes]) -> str:
    """The same as `sha256_of`, of what was read."""
    digests = [(name, hashlib.sha256(content).hexdigest()) for name, content in contents.items()]
    if CONFIG not in contents:
        return digests[0][1]
    return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in digests).encode()).hexdigest()
