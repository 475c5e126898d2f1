"""Answers of an S3 server to a store: which mean taken, which are repeated, and who must act on the others."""

from __future__ import annotations

import pytest
from botocore.exceptions import ClientError

from pipeline import store as store_module
from pipeline.answers import is_taken, is_transient
from pipeline.errors import StoreError
from pipeline.filesystems import filesystem
from pipeline.hashing import sha256
from pipeline.store import MissingObject, open_store


def http_error(status: int, code: str) -> OSError:
    """An error as s3fs raises it: an OSError caused by botocore's."""
    cause = ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject")
    error = OSError(22, "an unhelpful number")
    error.__cause__ = cause
    return error


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


def test_a_store_that_has_answered_is_waited_for_longer(s3_url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store_module, "FIRST_PAUSE_S", 0.0)
    store = open_store(s3_url)
    store.put_once("a", b"1")
    away = [(False, http_error(503, "SlowDown"))]
    Answers(monkeypatch, s3_url, [*away * (store_module.PATIENT_ATTEMPTS - 1), (True, None)])
    assert store.put_once("b", b"2") == sha256(b"2")
    Answers(monkeypatch, s3_url, away * store_module.PATIENT_ATTEMPTS)
    with pytest.raises(StoreError, match="cannot write c"):
        store.put_once("c", b"3")


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
