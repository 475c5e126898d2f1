"""The only door to storage: objects written once and whole, in a directory or a bucket.

Layer 1. An object is never rewritten: of any number of writers of one key, alive, half dead or repeated, the first
whole object stays, and each is told the SHA-256 of what is stored.
"""

from __future__ import annotations

import os
import random
import re
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from pipeline.answers import is_taken, is_transient, reason, server_answer
from pipeline.credentials import holds_credentials
from pipeline.errors import StoreError, nearest
from pipeline.filesystems import filesystem
from pipeline.hashing import sha256
from pipeline.whole_files import DRAFT, make_directories, sync, write_whole

T = TypeVar("T")

SCHEMES = ("file", "s3", "memory")
# a server may be started again: one that has answered before in this process and now refuses connections is waited for
# for about a minute. One that takes them and is silent is given up after 65 (a write) to 142 s (a read), and after 126
# to 143 s if it has answered; no attempt begins after the longest time
ATTEMPTS, LONGEST_S = 6, 60.0
PATIENT_ATTEMPTS, PATIENT_LONGEST_S = 10, 120.0
FIRST_PAUSE_S = 0.1  # before the second attempt; doubled for each further one, times a random ½ to 1
_answered: set[str] = set()
# fsspec splits a larger object into parts: one whole-object PUT is the unit of the commit protocol (S3 allows 5 GiB)
ONE_PUT_BYTES = 2 << 30


class MissingObject(StoreError):  # noqa: N818
    """No object is stored under this key."""


class Stored(NamedTuple):
    """What a listing says of an object: when it was stored, in UTC, and its size."""

    when: datetime
    bytes: int


class Store(ABC):
    """A root under which objects live by key ("runs/x/_manifest.json"). It is its URL: pickled, it carries no more."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __repr__(self) -> str:
        return f"open_store({self.url!r})"

    def put_once(self, key: str, content: bytes) -> str:
        """Store an object unless the key is taken; return the SHA-256 of what is stored under it now.

        Other bytes that are already there are adopted: the caller compares digests where it matters. A repeated or
        unacknowledged write finds its own bytes. StoreError if the store refuses or stays unavailable.
        """
        _check_key(key)
        if self._persist("write", key, lambda: self._create(key, content)):
            return sha256(content)
        return sha256(self.get(key))

    def put_all(self, contents: Iterable[tuple[str, bytes]]) -> None:
        """Store objects by key, each as `put_once` does, in order; all of them are safe once it returns."""
        for key, content in contents:
            self.put_once(key, content)

    def get(self, key: str) -> bytes:
        """The whole object; MissingObject if there is none."""
        _check_key(key)
        return self._persist("read", key, lambda: self._read(key))

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        """The bytes of an object from `start` to `stop`, fewer where it ends before; MissingObject if there is none."""
        _check_key(key)
        return self._persist("read", key, lambda: self._read_range(key, start, stop))

    def keys(self, prefix: str = "") -> list[str]:
        """Every key that begins with `prefix`, sorted, by one listing."""
        return sorted(self.modified(prefix))

    def modified(self, prefix: str = "") -> dict[str, datetime]:
        """When each key that begins with `prefix` was stored, in UTC, by one listing."""
        return {key: stored.when for key, stored in self.listing(prefix).items()}

    def listing(self, prefix: str = "") -> dict[str, Stored]:
        """Every key that begins with `prefix`, with when it was stored and its size, by one listing."""
        return self._persist("list", prefix, lambda: self._list(prefix))

    def folders(self, prefix: str) -> list[str]:
        """The names directly below `prefix` ("runs/") that have keys below them, sorted, without listing those."""
        return self._persist("list", prefix, lambda: sorted(self._folders(prefix)))

    def drafts(self) -> dict[str, Stored]:
        """What writers that were killed left behind, by names that are no keys; a bucket keeps nothing of them."""
        return {}

    def clear(self, draft: str) -> None:
        """Delete a draft; nothing happens if there is none."""
        self._persist("delete", draft, lambda: self._delete(draft))

    def remove(self, key: str) -> None:
        """Delete an object; nothing happens if there is none."""
        _check_key(key)
        self._persist("delete", key, lambda: self._delete(key))

    def probe(self) -> None:
        """Show that the store can be written and never replaces an object; StoreError saying what to do if not."""
        key = f"probe-{uuid.uuid4().hex}"
        first = self.put_once(key, b"first")
        try:
            kept = self.put_once(key, b"second") == first
        finally:
            with suppress(StoreError):
                self.remove(key)
        if not kept:
            raise StoreError(
                f"{self.url}: the store replaces an object that exists (it ignores If-None-Match), so two writers "
                "could destroy each other's results; enable conditional writes there, or choose another store"
            )

    def now(self) -> datetime:
        """The time by the store's own clock, in UTC: that of an object written for it; StoreError if none can be."""
        key = f"probe-{uuid.uuid4().hex}"
        self.put_once(key, b"now")
        try:
            return self.modified(key)[key]
        finally:
            with suppress(StoreError):
                self.remove(key)

    def _persist(self, action: str, key: str, attempt: Callable[[], T]) -> T:
        has_answered = self.url in _answered
        attempts = PATIENT_ATTEMPTS if has_answered else ATTEMPTS
        end_s = time.monotonic() + (PATIENT_LONGEST_S if has_answered else LONGEST_S)
        for number in range(attempts):
            try:
                result = attempt()
                _answered.add(self.url)
                return result
            except Exception as error:  # drivers share no base class; what is not theirs is re-raised
                is_last = number == attempts - 1 or time.monotonic() > end_s
                if is_last or not is_transient(error):
                    if refusal := _refusal(error, f"{self.url}: cannot {action} {key or 'its objects'}"):
                        raise refusal from error
                    raise
            time.sleep(FIRST_PAUSE_S * 2**number * random.uniform(0.5, 1))
        raise AssertionError("unreachable")

    @abstractmethod
    def _create(self, key: str, content: bytes) -> bool:
        """Store the whole object atomically; False if the key is taken."""

    @abstractmethod
    def _read(self, key: str) -> bytes: ...

    def _read_range(self, key: str, start: int, stop: int) -> bytes:
        return self._read(key)[start:stop]

    @abstractmethod
    def _list(self, prefix: str) -> dict[str, Stored]: ...

    def _folders(self, prefix: str) -> set[str]:
        below = (key.removeprefix(prefix).split("/") for key in self._list(prefix))
        return {parts[0] for parts in below if len(parts) > 1}

    @abstractmethod
    def _delete(self, key: str) -> None: ...


class DirectoryStore(Store):
    """A directory of a file system with hard links; a name that begins with a dot is a write that never finished."""

    def put_all(self, contents: Iterable[tuple[str, bytes]]) -> None:
        """Store objects by key, each as `put_once` does, and make their names in each directory safe at once."""
        changed: dict[Path, None] = {}
        try:
            for key, content in contents:
                _check_key(key)
                self._persist("write", key, partial(self._link, key, content, changed))
        finally:
            self._persist("write", "", partial(sync, changed))

    def _create(self, key: str, content: bytes) -> bool:
        changed: dict[Path, None] = {}
        try:
            return self._link(key, content, changed)
        finally:
            sync(changed)

    def _link(self, key: str, content: bytes, changed: dict[Path, None]) -> bool:
        """Store a whole file by name, and note which directories have other names in them now."""
        target = Path(self.url, key)
        try:
            make_directories(target.parent, changed)
        except (FileNotFoundError, FileExistsError) as error:
            raise StoreError(f"{self.url}: no directory can be made there ({error.strerror})") from error
        changed[target.parent] = None
        return write_whole(target, content)

    def _read(self, key: str) -> bytes:
        return self._read_range(key, 0, -1)

    def _read_range(self, key: str, start: int, stop: int) -> bytes:
        try:
            with open(Path(self.url, key), "rb") as file:
                file.seek(start)
                return file.read(stop - start if stop >= 0 else -1)
        except (NotADirectoryError, IsADirectoryError) as error:
            raise FileNotFoundError(key) from error

    def _list(self, prefix: str) -> dict[str, Stored]:
        found = {}
        top, _, begin = prefix.rpartition("/")
        for folder, below, names in os.walk(Path(self.url, top), onerror=_unless_gone):
            # a run's manifest is asked for beside the folder of all its models' rows
            below[:] = [name for name in below if name.startswith(begin)]
            begin = ""
            for name in names:
                path = Path(folder, name)
                key = path.relative_to(self.url).as_posix()
                if key.startswith(prefix) and not name.startswith("."):
                    with suppress(FileNotFoundError):
                        found[key] = _stored(path)
        return found

    def _folders(self, prefix: str) -> set[str]:
        with suppress(FileNotFoundError), os.scandir(Path(self.url, prefix)) as entries:
            return {entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")}
        return set()

    def _delete(self, key: str) -> None:
        Path(self.url, key).unlink(missing_ok=True)

    def drafts(self) -> dict[str, Stored]:
        """Files that were never linked to their key."""
        found = {}
        for path in Path(self.url).rglob(".*"):
            if re.fullmatch(DRAFT, path.name):
                with suppress(FileNotFoundError):
                    found[path.relative_to(self.url).as_posix()] = _stored(path)
        return found


class ObjectStore(Store):
    """A prefix of a bucket on S3, or of fsspec's in-memory file system (within one process, for tests)."""

    # the in-memory file system tests for existence and writes in two steps
    _memory_lock = threading.Lock()

    def _create(self, key: str, content: bytes) -> bool:
        fs, root = filesystem(self.url)
        try:
            with self._memory_lock if self.url.startswith("memory:") else nullcontext():
                fs.pipe_file(f"{root}/{key}", content, mode="create", chunksize=ONE_PUT_BYTES)
            return True
        except Exception as error:
            if is_taken(error):
                return False
            raise

    def _read(self, key: str) -> bytes:
        fs, root = filesystem(self.url)
        content: bytes = fs.cat_file(f"{root}/{key}")
        return content

    def _read_range(self, key: str, start: int, stop: int) -> bytes:
        fs, root = filesystem(self.url)
        content: bytes = fs.cat_file(f"{root}/{key}", start=start, end=stop)
        return content

    def _list(self, prefix: str) -> dict[str, Stored]:
        fs, root = filesystem(self.url)
        bucket, _, folder = root.lstrip("/").partition("/")
        wanted = f"{folder}/{prefix}" if folder else prefix
        found = fs.find(f"/{bucket}" if root.startswith("/") else bucket, prefix=wanted, detail=True)
        keys = {name.removeprefix(f"{root}/"): entry for name, entry in found.items() if name.startswith(f"{root}/")}
        return {
            key: Stored(
                entry["LastModified"] if "LastModified" in entry else datetime.fromtimestamp(entry["created"], UTC),
                entry["size"],
            )
            for key, entry in keys.items()
            if key.startswith(prefix) and entry["type"] == "file" and not key.endswith("/")
        }

    def _folders(self, prefix: str) -> set[str]:
        fs, root = filesystem(self.url)
        try:
            entries = fs.ls(f"{root}/{prefix}", detail=True)
        except FileNotFoundError as error:
            if _no_bucket(error):
                raise
            return set()
        return {entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in entries if entry["type"] == "directory"}

    def _delete(self, key: str) -> None:
        fs, root = filesystem(self.url)
        with suppress(FileNotFoundError):
            fs.rm_file(f"{root}/{key}")


def open_store(url: str) -> Store:
    """The store at a directory path, "file://…", "s3://bucket/prefix" or "memory://name"; nothing is touched yet."""
    if not url.strip():
        # it would be the current folder: an unset variable, most likely
        raise StoreError("the store's URL is empty; expected a directory, or file://…, s3://bucket/… or memory://…")
    scheme, separator, rest = url.partition("://")
    mistyped = re.match(r"(\w+):(?!//)/*", url)
    # first, as every other message repeats the URL; a path has no scheme, and may have any name
    if (separator or mistyped) and (holds_credentials(url) or (scheme != "file" and "@" in rest)):
        named = scheme if separator else url.partition(":")[0]
        raise StoreError(
            f"a {named}:// store URL must not hold credentials; put them in the environment (AWS_PROFILE …)"
        )
    if mistyped and mistyped[1].lower() in (*SCHEMES, "s3a"):
        # a folder called "s3:" would be made
        meant = mistyped[1].lower().removesuffix("a")
        expected = "file:///… or a path" if meant == "file" else f"{meant}://{url[mistyped.end() :]}"
        raise StoreError(f"store {url}: expected two slashes behind the scheme, {expected}")
    if scheme == "file" and separator and not rest.startswith(("/", "~")):
        raise StoreError(f"store {url}: expected a path from the root, file:///…, or a directory without file://")
    if not separator or scheme == "file":
        return DirectoryStore(str(_expanded(url, rest if separator else url).absolute()))
    if scheme not in SCHEMES:
        raise StoreError(f"store {url}: unknown scheme {scheme!r}; {nearest(scheme, SCHEMES)}")
    if not rest.strip("/"):
        raise StoreError(f"store {url}: expected a {'bucket' if scheme == 's3' else 'name'} behind {scheme}://")
    return ObjectStore(f"{scheme}://{rest.strip('/')}")


def _expanded(url: str, path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise StoreError(f"store {url}: this machine has no such user's home") from error


def _stored(path: Path) -> Stored:
    seen = path.stat()
    return Stored(datetime.fromtimestamp(seen.st_mtime, UTC), seen.st_size)


def _check_key(key: str) -> None:
    parts = key.split("/")
    if "\\" in key or any(not part or part.startswith(".") for part in parts):
        raise ValueError(f"{key!r} is no key: expected names between single slashes, none beginning with a dot")


def _unless_gone(error: OSError) -> None:
    # what is in a folder that cannot be read would be taken for missing, and what it needs for garbage
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise StoreError(f"{error.filename}: cannot be listed: {reason(error)}") from error


def _refusal(error: Exception, doing: str) -> StoreError | None:
    if isinstance(error, FileNotFoundError) and not _no_bucket(error):
        return MissingObject(f"{doing}: there is no such object")
    why = reason(error)
    return None if why is None else StoreError(f"{doing}: {why}")


def _no_bucket(error: Exception) -> bool:
    return server_answer(error)[1] == "NoSuchBucket"
