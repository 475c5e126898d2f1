"""The store: whole objects, written once, whoever writes, however often, wherever it dies."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from pipeline import store as store_module
from pipeline.answers import is_taken, is_transient
from pipeline.errors import DataError, StoreError
from pipeline.hashing import sha256
from pipeline.inputs import list_inputs, open_input
from pipeline.store import MissingObject, ObjectStore, Store, filesystem, open_store
from pipeline.withheld import Withheld


@pytest.fixture(params=["directory", "s3", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "directory":
        return open_store(str(tmp_path / "census"))
    if request.param == "s3":
        return open_store(request.getfixturevalue("s3_url"))
    return open_store(f"memory://{tmp_path.name}-{os.getpid()}/census")


def http_error(status: int, code: str) -> OSError:
    """An error as s3fs raises it: an OSError caused by botocore's."""
    cause = ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject")
    error = OSError(22, "an unhelpful number")
    error.__cause__ = cause
    return error


def test_an_object_is_read_back(store: Store):
    content = bytes(range(256)) * 1000
    assert store.put_once("runs/a/part-0.bin", content) == sha256(content)
    assert store.get("runs/a/part-0.bin") == content


def test_an_empty_object_is_an_object(store: Store):
    assert store.put_once("empty", b"") == sha256(b"")
    assert store.get("empty") == b""


def test_the_first_object_stays_and_its_digest_is_told(store: Store):
    store.put_once("a/b", b"first")
    assert store.put_once("a/b", b"second") == sha256(b"first")
    assert store.put_once("a/b", b"first") == sha256(b"first")
    assert store.get("a/b") == b"first"


def test_a_missing_object_is_an_error_of_its_own(store: Store):
    with pytest.raises(MissingObject, match="cannot read nowhere/x: there is no such object"):
        store.get("nowhere/x")
    store.put_once("a/b", b"1")
    with pytest.raises(MissingObject):
        store.get("a")
    with pytest.raises(MissingObject):
        store.get("a/b/c")


def test_keys_are_sorted_and_begin_with_the_prefix(store: Store):
    assert store.keys("states/") == []
    for key in ["states/m10/x", "states/m1/y", "states/m1/x", "models/m1", "states/m1/deep/er/z"]:
        store.put_once(key, b"1")
    assert store.keys("states/m1/") == ["states/m1/deep/er/z", "states/m1/x", "states/m1/y"]
    assert store.keys("states/m1") == ["states/m1/deep/er/z", "states/m1/x", "states/m1/y", "states/m10/x"]
    assert store.keys("states/m1/x") == ["states/m1/x"]
    assert store.keys("none/") == []
    assert len(store.keys("")) == 5


def test_roots_that_begin_alike_do_not_mix(store: Store):
    neighbour = open_store(f"{store.url}-2")
    neighbour.put_once("x", b"theirs")
    store.put_once("y", b"mine")
    assert store.keys("") == ["y"]
    assert neighbour.keys("") == ["x"]


def test_times_are_utc_and_recent(store: Store):
    store.put_once("log/a", b"1")
    (when,) = store.modified("log/").values()
    assert when.tzinfo is not None
    assert abs(datetime.now(UTC) - when) < timedelta(minutes=1)


def test_removed_is_missing_and_removing_twice_is_nothing(store: Store):
    store.put_once("a/b", b"1")
    store.remove("a/b")
    store.remove("a/b")
    assert store.keys("") == []
    assert store.put_once("a/b", b"2") == sha256(b"2")


@pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "../a", "a/../b", "a/.hidden", "a\\b"])
def test_what_is_no_key_is_refused(tmp_path: Path, key: str):
    with pytest.raises(ValueError, match="is no key"):
        open_store(str(tmp_path)).put_once(key, b"1")


def test_of_many_writers_one_wins_and_all_are_told_so(store: Store):
    contents = [f"writer {number}".encode() * 1000 for number in range(16)]
    with ThreadPoolExecutor(8) as pool:
        told = set(pool.map(lambda content: store.put_once("race/x", content), contents))
    assert told == {sha256(store.get("race/x"))}
    assert store.get("race/x") in contents
    assert store.keys("") == ["race/x"]


def test_of_many_processes_one_wins(tmp_path: Path):
    code = (
        "import sys, os; from pipeline.store import open_store; "
        "print(open_store(sys.argv[1]).put_once('race/x', sys.argv[2].encode() * 100_000))"
    )
    racers = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(n)], stdout=subprocess.PIPE) for n in range(3)
    ]
    told = {racer.communicate()[0].decode().strip() for racer in racers}
    assert told == {sha256(open_store(str(tmp_path)).get("race/x"))}


def test_the_probe_leaves_nothing_behind(store: Store):
    store.probe()
    assert store.keys("") == []


def test_the_probe_creates_the_directory(tmp_path: Path):
    open_store(str(tmp_path / "a" / "b")).probe()
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_the_probe_refuses_a_store_that_overwrites(s3_url: str, monkeypatch: pytest.MonkeyPatch):
    def careless(self: ObjectStore, key: str, content: bytes) -> bool:
        fs, root = filesystem(self.url)
        fs.pipe_file(f"{root}/{key}", content, mode="overwrite")
        return True

    monkeypatch.setattr(ObjectStore, "_create", careless)
    careless_store = open_store(s3_url)
    with pytest.raises(StoreError, match=r"ignores If-None-Match.*enable conditional writes"):
        careless_store.probe()
    assert careless_store.keys("") == []


def test_pickled_it_is_its_url(store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing-secret")
    store.put_once("a", b"1")
    pickled = pickle.dumps(store)
    assert b"testing" not in pickled.replace(store.url.encode(), b"")
    assert pickle.loads(pickled).get("a") == b"1"


def test_a_relative_directory_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert open_store("census").url == str(tmp_path / "census")
    assert open_store(f"file://{tmp_path}/census").url == str(tmp_path / "census")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s4://bucket", "unknown scheme 's4'; did you mean 's3'"),
        ("s3://", "expected a bucket"),
        ("memory://", "expected a name"),
    ],
)
def test_a_store_that_cannot_be(url: str, message: str):
    with pytest.raises(StoreError, match=message):
        open_store(url)


def test_credentials_in_a_url_are_refused_and_not_repeated():
    with pytest.raises(StoreError) as caught:
        open_store("s3://AKIA123:hunter2@bucket/prefix")
    assert "hunter2" not in str(caught.value)
    assert "environment" in str(caught.value)


# --- a directory ------------------------------------------------------------------------------------------------------


def test_killed_before_the_link_nothing_is_visible(tmp_path: Path):
    code = (
        "import os, signal, sys; from pipeline.store import open_store; "
        "os.link = lambda *a: os.kill(os.getpid(), signal.SIGKILL); "
        "open_store(sys.argv[1]).put_once('runs/x', b'1' * 100_000)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    store = open_store(str(tmp_path))
    assert len(list((tmp_path / "runs").iterdir())) == 1, "the draft is there"
    assert store.keys("") == []
    with pytest.raises(MissingObject):
        store.get("runs/x")
    assert store.put_once("runs/x", b"2") == sha256(b"2")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What is done to the disk, in order: "safe" for a file or directory, "named" for a file, each by its inode."""
    done: list[tuple[str, int]] = []
    fsync, link, mkdir = os.fsync, os.link, Path.mkdir

    def synced(handle: int) -> None:
        fsync(handle)
        done.append(("safe", os.fstat(handle).st_ino))

    def linked(draft: Path, target: Path) -> None:
        link(draft, target)
        done.append(("named", os.stat(target).st_ino))

    def made(path: Path, **options: Any) -> None:
        mkdir(path, **options)
        done.append(("named", os.stat(path).st_ino))

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "link", linked)
    monkeypatch.setattr(Path, "mkdir", made)
    return done


def is_safe(path: Path, done: list[tuple[str, int]]) -> bool:
    """Whether a file's content was safe before it was named, and its name, and those of its folders, are now."""
    named = done.index(("named", path.stat().st_ino))
    content = path.is_dir() or ("safe", path.stat().st_ino) in done[:named]
    return content and ("safe", path.parent.stat().st_ino) in done[named:]


def test_what_is_stored_is_safe(tmp_path: Path, disk: list[tuple[str, int]]):
    store = open_store(str(tmp_path / "census"))
    store.put_once("runs/a/x", b"1")
    assert all(is_safe(path, disk) for path in tmp_path.rglob("*"))
    before = len(disk)
    store.put_all([("states/m/r/0", b"1"), ("states/m/t/0", b"2"), ("runs/a/y", b"3"), ("runs/a/x", b"4")])
    assert len(list(tmp_path.rglob("*"))) == 11
    assert all(is_safe(path, disk) for path in tmp_path.rglob("*"))
    # two folders of one object each, the two that these are in, the root, and one of two objects: each once
    folders = [one for one in disk[before:] if one[0] == "safe"]
    assert len(folders) == 4 + 6
    assert [store.get(f"runs/a/{name}") for name in "xy"] == [b"1", b"3"]


def test_what_was_stored_before_a_failure_is_safe(tmp_path: Path, disk: list[tuple[str, int]]):
    store = open_store(str(tmp_path))
    with pytest.raises(ValueError, match="is no key"):
        store.put_all([("a/x", b"1"), ("a/../y", b"2")])
    assert is_safe(tmp_path / "a" / "x", disk)
    assert is_safe(tmp_path / "a", disk)


def test_several_are_stored_as_one_is(store: Store):
    store.put_once("b/1", b"theirs")
    store.put_all((f"{name}/{number}", b"mine") for name in "ab" for number in range(3))
    assert store.keys() == ["a/0", "a/1", "a/2", "b/0", "b/1", "b/2"]
    assert (store.get("a/2"), store.get("b/1")) == (b"mine", b"theirs")


def test_a_failed_write_leaves_no_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"cannot write a/b: No space left on device: free space"):
        open_store(str(tmp_path)).put_once("a/b", b"1")
    monkeypatch.undo()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_file_system_without_hard_links_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_links(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(StoreError, match="must support hard links"):
        open_store(str(tmp_path)).probe()


def unreadable(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let one folder be refused to this process, which may be root and read everything."""
    real = os.scandir

    def scandir(path):
        if Path(path) == folder:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)


def test_a_folder_that_cannot_be_read_is_not_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = open_store(str(tmp_path))
    store.put_once("runs/a/claims", b"")
    unreadable(monkeypatch, tmp_path / "runs/a")
    for prefix in ("", "runs/", "runs/a/"):
        with pytest.raises(StoreError, match=r"runs/a: cannot be listed: access denied \(PermissionError\)"):
            store.keys(prefix)
    with pytest.raises(StoreError, match="access denied"):
        store.folders("runs/a/")
    assert store.keys("models/") == store.keys("runs/b/") == []


def test_a_directory_that_is_a_file_is_refused(tmp_path: Path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(StoreError, match="taken"):
        open_store(str(tmp_path / "taken")).probe()


# --- answers of an S3 server ------------------------------------------------------------------------------------------


def test_precondition_failed_means_taken_whatever_number_it_came_with():
    assert is_taken(http_error(412, "PreconditionFailed"))
    assert is_taken(FileExistsError())
    assert not is_taken(http_error(403, "AccessDenied"))


def test_conflicts_and_overload_are_repeated_and_refusals_are_not():
    assert is_transient(http_error(409, "ConditionalRequestConflict"))
    assert is_transient(http_error(503, "SlowDown"))
    assert is_transient(http_error(500, "InternalError"))
    assert not is_transient(http_error(403, "AccessDenied"))
    assert not is_transient(http_error(412, "PreconditionFailed"))
    assert not is_transient(OSError(28, "full"))


class Answers:
    """Put in place of an S3 file system's PUT: gives the answers of a list, and does the write where told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, url: str, answers: list[tuple[bool, OSError | None]]) -> None:
        fs, _ = filesystem(url)
        self.put, self.answers = fs.pipe_file, answers
        monkeypatch.setattr(fs, "pipe_file", self)
        monkeypatch.setattr(store_module, "FIRST_PAUSE_S", 0.0)

    def __call__(self, *args: object, **kwargs: object) -> None:
        writes, error = self.answers.pop(0)
        if writes:
            self.put(*args, **kwargs)
        if error is not None:
            raise error


def test_overload_passes(s3_url: str, monkeypatch: pytest.MonkeyPatch):
    answers = Answers(
        monkeypatch,
        s3_url,
        [(False, http_error(503, "SlowDown")), (False, http_error(409, "ConditionalRequestConflict")), (True, None)],
    )
    assert open_store(s3_url).put_once("a", b"1") == sha256(b"1")
    assert answers.answers == []


def test_a_lost_acknowledgement_finds_its_own_bytes(s3_url: str, monkeypatch: pytest.MonkeyPatch):
    Answers(monkeypatch, s3_url, [(True, http_error(500, "InternalError")), (True, None)])
    store = open_store(s3_url)
    assert store.put_once("a", b"1") == sha256(b"1")
    assert store.get("a") == b"1"


def test_overload_that_stays_is_an_error(s3_url: str, monkeypatch: pytest.MonkeyPatch):
    Answers(monkeypatch, s3_url, [(False, http_error(503, "SlowDown"))] * store_module.ATTEMPTS)
    with pytest.raises(StoreError, match=r"cannot write a: the server refuses \(SlowDown, HTTP 503\)"):
        open_store(s3_url).put_once("a", b"1")


def test_denied_access_says_who_must_do_what(s3_url: str, monkeypatch: pytest.MonkeyPatch):
    error = PermissionError("Access Denied for AKIA…")
    error.__cause__ = http_error(403, "AccessDenied").__cause__
    Answers(monkeypatch, s3_url, [(False, error)])
    with pytest.raises(
        StoreError, match=r"access denied \(AccessDenied, HTTP 403\): its operator must allow"
    ) as caught:
        open_store(s3_url).put_once("a", b"1")
    assert "AKIA" not in str(caught.value)


def test_a_bucket_that_is_not_there(s3_server: str):
    with pytest.raises(StoreError, match=r"the bucket does not exist .*: create it") as caught:
        open_store("s3://no-such-bucket-here/x").probe()
    assert not isinstance(caught.value, MissingObject)
    with pytest.raises(StoreError, match="the bucket does not exist"):
        open_store("s3://no-such-bucket-here/x").keys("")


def test_a_server_that_is_not_there(s3_server: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store_module, "FIRST_PAUSE_S", 0.0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(StoreError, match=r"does not answer .*: check AWS_ENDPOINT_URL"):
        open_store("s3://bucket/x").probe()


def test_no_credentials(s3_server: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    with pytest.raises(StoreError, match="no credentials found: set"):
        open_store("s3://bucket/x").probe()


def test_a_large_object_is_one_put(s3_url: str, monkeypatch: pytest.MonkeyPatch):
    fs, _ = filesystem(s3_url)
    methods: list[str] = []
    call = fs._call_s3

    async def counted(method: str, *args: object, **kwargs: object) -> object:
        methods.append(method)
        return await call(method, *args, **kwargs)

    monkeypatch.setattr(fs, "_call_s3", counted)
    content = bytes(101 << 20)
    open_store(s3_url).put_once("large", content)
    assert methods == ["put_object"]
    methods.clear()
    assert open_store(s3_url).get("large") == content
    assert methods == ["get_object"]


# --- inputs -----------------------------------------------------------------------------------------------------------


def test_inputs_of_a_directory_a_glob_and_a_file(store: Store):
    for key in ["data/b.parquet", "data/deep/a.parquet", "data/_SUCCESS", "data/_delta_log/0.json"]:
        store.put_once(key, key.encode())
    names = [file.url.partition("census/")[2] for file in list_inputs(f"{store.url}/data")]
    assert names == ["data/b.parquet", "data/deep/a.parquet"]
    (file,) = list_inputs(f"{store.url}/data/*.parquet")
    assert file.size == len("data/b.parquet")
    (named,) = list_inputs(f"{store.url}/data/_SUCCESS")
    with open_input(named.url) as stream:
        stream.seek(5)
        assert stream.read(3) == b"_SU"


def test_an_input_that_is_not_there(store: Store):
    store.put_once("data/a", b"1")
    for missing in ["nothing", "data/*.parquet", "data/a/b"]:
        with pytest.raises(DataError, match="there is no such file, directory or match"):
            list_inputs(f"{store.url}/{missing}")
    with pytest.raises(DataError, match="cannot be read: there is no such file"):
        open_input(f"{store.url}/nothing").read(1)


def test_an_input_scheme_without_a_package():
    with pytest.raises(DataError, match="no installed package reads"):
        list_inputs("nosuchscheme://x/y")


def test_a_changed_input_has_another_etag(tmp_path: Path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"1")
    (before,) = list_inputs(str(path))
    path.unlink()
    path.write_bytes(b"2")
    os.utime(path, ns=(1, 1))
    (after,) = list_inputs(str(path))
    assert before.etag != after.etag


def test_what_is_withheld_is_there_for_whoever_withholds_it_alone(store: Store):
    below = store
    below.put_once("data/old", b"old")
    withheld = Withheld(below)
    assert withheld.put_once("data/new", b"new") == sha256(b"new")
    assert withheld.put_once("data/new", b"other") == sha256(b"new")
    assert withheld.put_once("data/old", b"other") == sha256(b"old")
    withheld.remove("data/old")
    assert withheld.keys("data/") == ["data/new"]
    assert withheld.get("data/new") == b"new"
    with pytest.raises(MissingObject):
        withheld.get("data/old")
    assert below.keys() == ["data/old"]
    withheld.release()
    assert (below.keys(), below.get("data/new")) == (["data/new"], b"new")
    below.remove("data/new")
    withheld.release()
    assert below.keys() == []
