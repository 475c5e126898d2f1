"""The store: whole objects, written once, whoever writes, however often, wherever it dies."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pipeline.errors import DataError, StoreError
from pipeline.filesystems import filesystem
from pipeline.hashing import sha256
from pipeline.inputs import list_inputs, open_input
from pipeline.store import MissingObject, ObjectStore, Store, open_store
from pipeline.withheld import Withheld


@pytest.fixture(params=["directory", "s3", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "directory":
        return open_store(str(tmp_path / "census"))
    if request.param == "s3":
        return open_store(request.getfixturevalue("s3_url"))
    return open_store(f"memory://{tmp_path.name}-{os.getpid()}/census")


def test_an_object_is_read_back(store: Store):
    content = bytes(range(256)) * 1000
    assert store.put_once("runs/a/part-0.bin", content) == sha256(content)
    assert store.get("runs/a/part-0.bin") == content


def test_a_part_of_an_object_is_read(store: Store):
    content = bytes(range(256)) * 1000
    store.put_once("a/b", content)
    assert store.get_range("a/b", 10, 1000) == content[10:1000]
    assert store.get_range("a/b", 255_000, 300_000) == content[255_000:]
    assert store.get_range("a/b", 0, 1) == content[:1]
    with pytest.raises(MissingObject, match="cannot read a/c: there is no such object"):
        store.get_range("a/c", 0, 1)


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


def test_a_folder_behind_a_link_is_found_where_it_was_made(tmp_path: Path):
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "deep")
    url = str(tmp_path / "link" / ".." / "store")
    open_store(url).put_once("a", b"1")
    fs, path = filesystem(url)
    assert fs.cat_file(f"{path}/a") == b"1"
    assert (tmp_path / "real" / "store" / "a").exists()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s4://bucket", "unknown scheme 's4'; did you mean 's3'"),
        ("s3://", "expected a bucket"),
        ("memory://", "expected a name"),
        ("", "the store's URL is empty"),
        (" ", "the store's URL is empty"),
        ("s3:/bucket/census", "expected two slashes behind the scheme, s3://bucket/census$"),
        ("S3:bucket", "expected two slashes behind the scheme, s3://bucket$"),
        ("s3a:/bucket", "expected two slashes behind the scheme, s3://bucket$"),
        ("memory:x", "expected two slashes behind the scheme, memory://x$"),
        ("file:/census", "expected two slashes behind the scheme, file:///… or a path$"),
        ("file://localhost/census", "expected a path from the root, file:///"),
        ("file://census", "expected a path from the root, file:///"),
        ("~nobody-of-this-name/census", "this machine has no such user's home"),
    ],
)
def test_a_store_that_cannot_be(url: str, message: str):
    with pytest.raises(StoreError, match=message):
        open_store(url)


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIA123:hunter2@bucket/prefix",
        "s3:/AKIA123:hunter2@bucket",
        "S3:AKIA123:hunter2@bucket",
        "s3a:/AKIA123:hunter2@bucket",
        "s4://AKIA123:hunter2@bucket",
        "file://bob:hunter2@/x",
        "file:/bob:hunter2@host/x",
        "https://host/x?private_token=hunter2",
    ],
)
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str):
    with pytest.raises(StoreError) as caught:
        open_store(url)
    assert "hunter2" not in str(caught.value)
    assert "environment" in str(caught.value)


def test_several_are_stored_as_one_is(store: Store):
    store.put_once("b/1", b"theirs")
    store.put_all((f"{name}/{number}", b"mine") for name in "ab" for number in range(3))
    assert store.keys() == ["a/0", "a/1", "a/2", "b/0", "b/1", "b/2"]
    assert (store.get("a/2"), store.get("b/1")) == (b"mine", b"theirs")


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
