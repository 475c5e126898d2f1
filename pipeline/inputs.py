"""The files of a data set, on any URL that fsspec reads.

Layer 1: storage is reached through `filesystems.py` alone.
"""

from __future__ import annotations

import difflib
import glob
import io
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from pipeline.answers import is_absent, is_taken, reason
from pipeline.errors import CensusError, DataError, MissingData, StoreError
from pipeline.filesystems import filesystem, following_links


@dataclass(frozen=True)
class InputFile:
    """A file of a data set. `etag` changes when the content does: the server's ETag, or inode and time of change.

    modified_s  when it was last written, in seconds since 1970; None where the server's ETag names the content
    """

    url: str
    size: int
    etag: str
    modified_s: float | None = None


def list_inputs(url_or_glob: str) -> list[InputFile]:
    """The files of a URL, sorted by name: the file itself, all files below a directory, or what a glob matches.

    Links are followed. Names that begin with "." or "_" are not data below a directory, or behind where a glob begins.
    DataError if nothing is found, or a link leads to nothing or to a directory that it lies in.
    """
    with input_errors(url_or_glob):
        fs, path = filesystem(url_or_glob)
        fs = following_links() if _is_local(fs) else fs
        found = _found(fs, path)
        _refuse_unfit_names(found)
        _refuse_broken_links(found)
        files = [
            InputFile(
                name if _is_local(fs) else fs.unstrip_protocol(name),
                int(entry["size"]),
                _etag(entry),
                _modified_s(entry),
            )
            for name, entry in found.items()
            if entry["type"] == "file"
        ]
        if not files:
            meant = _pattern(fs, path) or (_nearest(Path(path)) if _is_local(fs) else "")
            raise MissingData(
                f"{url_or_glob}: there is no such file, directory or match; {meant}expected at least one data file"
            )
    return files


def _found(fs: Any, path: str) -> dict[str, dict[str, Any]]:
    """What is at a path, below it or matches it, by its name and in order, without what is not data."""
    find = fs.glob if glob.has_magic(path) else fs.find
    found: dict[str, dict[str, Any]] = find(path, detail=True)
    if not found and find == fs.find:
        _look_again(fs, path)
    fixed = re.split(r"[*?[]", path, maxsplit=1)[0]
    named = fixed.rstrip("/")
    data = {name: found[name] for name in sorted(found) if not re.search(r"/[._]", name.removeprefix(named))}
    if not _is_local(fs):
        return data
    return _without_second_names(data, path if find == fs.find else fixed.rpartition("/")[0] or "/")


def _without_second_names(found: dict[str, dict[str, Any]], directory: str) -> dict[str, dict[str, Any]]:
    """What is below a directory, without links to what is there by its own name."""
    root = os.path.realpath(directory)
    folders = {folder: os.path.realpath(folder) for folder in {name.rpartition("/")[0] for name in found}}

    def real(name: str) -> str:
        folder, _, own = name.rpartition("/")
        return os.path.realpath(name) if found[name].get("islink") else f"{folders[folder]}/{own}"

    reals = {name: real(name) for name in found}
    own = {name: entry for name, entry in found.items() if reals[name] == root + name.removeprefix(directory)}
    there = set(map(reals.__getitem__, own))

    def is_second(name: str) -> bool:
        in_circles = found[name]["type"] == "other" and os.path.isdir(name)
        return reals[name] in there or (in_circles and Path(reals[name]).is_relative_to(root))

    return {name: entry for name, entry in found.items() if name in own or not is_second(name)}


def _refuse_unfit_names(names: Iterable[str]) -> None:
    """DataError at the first name that no table and no reader of a format can have."""
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise DataError(f"{os.fsencode(name)!r}: its name is not UTF-8; rename it") from None


def _refuse_broken_links(found: dict[str, dict[str, Any]]) -> None:
    """DataError at the first link that is neither a file nor a directory to look into."""
    for name, entry in found.items():
        if entry["type"] == "other" and entry.get("islink"):
            wrong = "a directory that it lies in" if os.path.isdir(name) else "nothing"
            raise DataError(
                f"{name}: a link to {os.readlink(name)}, which is {wrong}; expected a file or another directory"
            )


def _pattern(fs: Any, path: str) -> str:
    """How to write a path that is read as a pattern, where it or a directory of it is there by that very name."""
    named = (str(one) for one in (PurePosixPath(path), *PurePosixPath(path).parents))
    there = next((one for one in named if glob.has_magic(one) and fs.exists(one)), "")
    if not there:
        return ""
    written = glob.escape(there) + (path[len(there) :] or ("/*" if fs.isdir(there) else ""))
    directory = "" if glob.has_magic(there.rpartition("/")[0]) else "name the directory it is in, or "
    if not _is_local(fs):
        there, written = fs.unstrip_protocol(there), fs.unstrip_protocol(written)
    return f"it is read as a pattern, and {there} is there: {directory}write {written!r}; "


def _look_again(fs: Any, path: str) -> None:
    """Raise what keeps a driver from finding anything: some take a server that does not answer for an empty one."""
    try:
        fs.info(path)
    except Exception as error:
        if not is_absent(error):
            raise


def _nearest(path: Path) -> str:
    """What is there instead of the first part of a path that is not."""
    while not path.parent.is_dir():
        path = path.parent
    if path.exists() or glob.has_magic(path.name):
        return ""
    # the suffixes are alike anyway
    beside = {one.stem: one.name for one in sorted(path.parent.iterdir())}
    close = difflib.get_close_matches(path.stem, beside, n=1, cutoff=0.5)
    return f"did you mean {beside[close[0]]!r}? " if close else ""


def input_file(url: str) -> InputFile:
    """One file as it is now; DataError if there is none."""
    with input_errors(url):
        fs, path = filesystem(url)
        entry = fs.info(path)
    if entry["type"] != "file":
        raise DataError(f"{url}: expected a file, found a {entry['type']}")
    return InputFile(url, int(entry["size"]), _etag(entry), _modified_s(entry))


def open_input(url: str) -> IO[bytes]:
    """A readable, seekable file at any URL; each read is one range request. DataError if there is none."""
    with input_errors(url):
        fs, path = filesystem(url)
        if _is_local(fs):
            return open(path, "rb")
        if "memory" in fs.protocol:
            return io.BytesIO(fs.cat_file(path))  # its open() hands the same file object to every reader
        return fs.open(path, "rb", cache_type="none")  # type: ignore[no-any-return]


@contextmanager
def input_errors(url: str) -> Iterator[None]:
    """Turn a failure to read `url` into DataError (it is not there, or changed) or StoreError (storage is not well)."""
    try:
        yield
    except CensusError:
        raise
    except Exception as error:
        if is_taken(error):
            raise DataError(f"{url}: the file was replaced while it was read; run again") from error
        if (why := reason(error, access="reading and listing")) is None:
            raise
        kind = DataError if is_absent(error) else StoreError
        raise kind(f"{url}: cannot be read: {why}") from error


class WatchedInput:
    """A file that remembers its failure: a reader of formats cannot tell a broken connection from broken content."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.failure: Exception | None = None

    def read(self, size: int = -1) -> bytes:
        """Read as the file does; what it raises stays in `failure`."""
        try:
            return self._stream.read(size)
        except Exception as error:
            self.failure = error
            raise

    def seek(self, offset: int, whence: int = 0) -> int:
        """Seek as the file does."""
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        """Tell as the file does."""
        return self._stream.tell()

    def close(self) -> None:
        """Do nothing: who opened the file closes it."""

    @property
    def closed(self) -> bool:
        """Whether the file is closed."""
        return self._stream.closed


def _is_local(fs: Any) -> bool:
    return "file" in fs.protocol


def _modified_s(entry: dict[str, Any]) -> float | None:
    return None if "ETag" in entry else float(entry.get("mtime", 0.0))


def _etag(entry: dict[str, Any]) -> str:
    if "ETag" in entry:
        return str(entry["ETag"]).strip('"')
    return f"{entry.get('ino', '')}-{entry.get('mtime', entry.get('created', ''))}"
