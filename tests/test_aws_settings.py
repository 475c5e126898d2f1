"""AWS settings that cannot be used: one message, the variable named, no secret repeated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.aws_settings import check_settings
from pipeline.errors import StoreError
from pipeline.inputs import list_inputs
from pipeline.store import open_store
from tests.command_line import call, refused

ASKED: tuple[Callable[[], object], ...] = (
    lambda: open_store("s3://bucket/x").keys(""),
    lambda: open_store("s3://bucket/x").put_once("k", b"x"),
    lambda: list_inputs("s3://bucket/x/*.parquet"),
)
ENDPOINT = "expected http://HOST:PORT or https://HOST:PORT"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("AWS_ENDPOINT_URL", "localhost:9000", f"AWS_ENDPOINT_URL = 'localhost:9000': {ENDPOINT}"),
        ("AWS_ENDPOINT_URL", "http://", f"AWS_ENDPOINT_URL = 'http://': {ENDPOINT}"),
        ("AWS_ENDPOINT_URL", "http://[::1", f"AWS_ENDPOINT_URL = 'http://[::1': {ENDPOINT}"),
        ("AWS_ENDPOINT_URL", "http://host:99999", f"AWS_ENDPOINT_URL = 'http://host:99999': {ENDPOINT}"),
        ("AWS_ENDPOINT_URL", "ftp://host", f"AWS_ENDPOINT_URL = 'ftp://host': {ENDPOINT}"),
        ("AWS_ENDPOINT_URL", "bob:hunter2@127.0.0.1:9", f"AWS_ENDPOINT_URL: {ENDPOINT}"),
        ("AWS_ENDPOINT_URL", "http://bob:hunter2@127.0.0.1:9", f"AWS_ENDPOINT_URL: {ENDPOINT}"),
        ("AWS_ENDPOINT_URL_S3", "localhost:9000", f"AWS_ENDPOINT_URL_S3 = 'localhost:9000': {ENDPOINT}"),
        ("AWS_MAX_ATTEMPTS", "foo", "AWS_MAX_ATTEMPTS = 'foo': expected a whole number from 1"),
        ("AWS_MAX_ATTEMPTS", "0", "AWS_MAX_ATTEMPTS = '0': expected a whole number from 1"),
        ("AWS_RETRY_MODE", "standart", "AWS_RETRY_MODE = 'standart': did you mean 'standard'?"),
        ("AWS_S3_ADDRESSING_STYLE", "pathh", "AWS_S3_ADDRESSING_STYLE = 'pathh': did you mean 'path'?"),
        ("AWS_CA_BUNDLE", "/nowhere.pem", "AWS_CA_BUNDLE = '/nowhere.pem': expected a file of certificates"),
        ("AWS_PROFILE", "nobodys", "AWS_PROFILE names no profile of the AWS config files"),
        ("AWS_REGION", "us east", "AWS_REGION, or AWS_DEFAULT_REGION, is no region's name"),
        ("AWS_METADATA_SERVICE_TIMEOUT", "foo", "the AWS settings cannot be used: one of the AWS_ variables"),
        ("AWS_REQUEST_CHECKSUM_CALCULATION", "foo", "check the AWS_ variables and the AWS config file"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(
    s3_server: str, name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    for ask in ASKED:
        with pytest.raises(StoreError) as caught:
            ask()
        assert said in str(caught.value)
        assert "hunter2" not in str(caught.value)


def test_a_config_file_that_cannot_be_used(s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    (tmp_path / "config").write_text("[default]\nendpoint_url = bob:hunter2@host\n")
    with pytest.raises(StoreError, match=r"of the entries of the AWS config file \(endpoint_url") as caught:
        open_store("s3://bucket/x").keys("")
    assert "hunter2" not in str(caught.value)
    (tmp_path / "config").write_text("no section\n")
    # read anew
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    with pytest.raises(StoreError, match="the AWS config file is not valid: correct it"):
        open_store("s3://bucket/x").keys("")


def test_a_name_that_no_bucket_has(s3_server: str) -> None:
    with pytest.raises(StoreError, match="the name of the bucket or object is not valid: a bucket has letters"):
        open_store("s3://my bucket/x").keys("")


def test_settings_that_are_right_pass(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").touch()
    for endpoint in ("http://localhost:9000", "https://s3.example.com", "http://[::1]:9000", "https://host/path", ""):
        check_settings({"AWS_ENDPOINT_URL": endpoint, "AWS_MAX_ATTEMPTS": "5", "AWS_RETRY_MODE": "adaptive"})
    check_settings({"AWS_CA_BUNDLE": str(tmp_path / "ca.pem"), "AWS_S3_ADDRESSING_STYLE": "virtual"})


def test_at_the_command_line_it_is_one_message(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    refused(call("query", "FROM neurons", "--store", "s3://bucket/x"), "AWS_ENDPOINT_URL = 'localhost:9000': expected")
