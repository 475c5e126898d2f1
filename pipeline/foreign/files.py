"""Which files are models, and their bytes.

Layer 2: storage only through `inputs`. What is read is checked against its pin before anything looks into it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from pipeline.errors import DataError, MissingData
from pipeline.inputs import InputFile, input_errors, list_inputs, open_input

STATES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
PROGRAMS = (".pt2", ".onnx")
# what a transformers directory may bring: nothing that is run, and no pickle
DIRECTORY = (".json", ".txt", ".safetensors", ".model")
CONFIG = "config.json"
READ_BYTES = 8 << 20  # of one request to a server


@dataclass(frozen=True)
class ModelFiles:
    """One model: `name` tells it from the others of its entry, `files` by their name within it."""

    name: str
    files: tuple[tuple[str, InputFile], ...]

    @property
    def config(self) -> InputFile | None:
        """What makes it a transformers directory."""
        return dict(self.files).get(CONFIG)

    @property
    def is_program(self) -> bool:
        """Whether it says itself what it computes."""
        return any(name.endswith(PROGRAMS) for name, _ in self.files)


def find_models(location: str) -> tuple[ModelFiles, ...]:
    """Every model at `location`, an absolute URL, named without its suffix where that is enough; DataError if none."""
    files = [(PurePosixPath(file.url), file) for file in _listed(location)]
    directories = {path.parent for path, _ in files if path.name == CONFIG}
    found = [_directory(directory, files) for directory in sorted(directories)]
    single = [one for one in files if not directories & set(one[0].parents) and one[0].suffix in STATES + PROGRAMS]
    named = Counter([*directories, *(path.with_suffix("") for path, _ in single)])
    for path, file in single:
        short = path.with_suffix("")
        found.append((short if named[short] == 1 else path, ((path.name, file),)))
    if not found:
        raise DataError(
            f"{location}: no model is there; expected a directory with {CONFIG}, or *{', *'.join(STATES + PROGRAMS)}"
        )
    return tuple(
        ModelFiles(name, kept) for name, (_, kept) in zip(_names([path for path, _ in found]), found, strict=True)
    )


def _listed(location: str) -> list[InputFile]:
    """The files of a URL; those in the directories that a glob matches if it matches no file."""
    try:
        return list_inputs(location)
    except MissingData:
        if not any(sign in location for sign in "*?["):
            raise
    try:
        return list_inputs(f"{location.rstrip('/')}/*")
    except MissingData:
        raise DataError(f"{location}: there is no such file or directory; expected at least one model") from None


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


def digests_of(model: ModelFiles) -> dict[str, str]:
    """SHA-256 of each of its files, by name: one pass over their bytes."""
    return {name: _sha256(file) for name, file in model.files}


def sha256_of(digests: Mapping[str, str]) -> str:
    """SHA-256 of the only file, or of what sha256sum says of a directory's files in order."""
    if CONFIG not in digests:
        (only,) = digests.values()
        return only
    return _sha256_of_lines(digests)


def pin_of(models: Sequence[ModelFiles], digests: Sequence[Mapping[str, str]]) -> str:
    """What a job may pin: SHA-256 of the only model, or of what sha256sum says of all files of several, by their names.

    Those are without the directories that all of them share: `cd models; LC_ALL=C sha256sum * | sha256sum`.
    """
    if len(models) == 1:
        return sha256_of(digests[0])
    urls = {file.url: hashed[name] for model, hashed in zip(models, digests, strict=True) for name, file in model.files}
    return _sha256_of_lines(dict(sorted(zip(_names([PurePosixPath(url) for url in urls]), urls.values(), strict=True))))


def _sha256_of_lines(digests: Mapping[str, str]) -> str:
    return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in digests.items()).encode()).hexdigest()


def _sha256(file: InputFile) -> str:
    found = hashlib.sha256()
    with input_errors(file.url), open_input(file.url) as opened:
        while block := opened.read(READ_BYTES):
            found.update(block)
    return found.hexdigest()


def read_model(model: ModelFiles, digests: Mapping[str, str]) -> dict[str, bytes]:
    """Its files by name; DataError unless they are those of these SHA-256."""
    contents = {}
    for name, file in model.files:
        with input_errors(file.url), open_input(file.url) as opened:
            contents[name] = opened.read()
        found = hashlib.sha256(contents[name]).hexdigest()
        if found != digests[name]:
            raise DataError(f"{file.url}: its sha256 is {found}, expected {digests[name]}: it was changed; run again")
    return contents
