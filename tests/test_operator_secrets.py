"""Credentials reach the store's server, and nothing else."""

from __future__ import annotations

import logging
import os
import pickle
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.errors import StoreError
from pipeline.manifest import committed_runs
from pipeline.plan import make_plan
from pipeline.report.status import print_submissions
from pipeline.resolve import resolve
from pipeline.store import open_store
from pipeline.submission import chosen
from pipeline.task import run_task
from tests.census import write_job
from tests.durability.schedules import tiny_job
from tests.operating import call
from tests.servers import Prefect

# each is searched for in everything that a run leaves behind
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI-secret-8f14e45f",
    "AWS_SESSION_TOKEN": "FwoGZXIvYXdzEBYaD-token-c9f0f895",
    "PREFECT_API_KEY": "pnu_key-45c48cce2e2d",
}


def everything_in(store_url: str) -> bytes:
    store = open_store(store_url)
    return b"\0".join(key.encode() + store.get(key) for key in store.keys(""))


def assert_holds_no_secret(content: bytes, where: str) -> None:
    for name, value in SECRETS.items():
        assert value.encode() not in content, f"{name} is in {where}"


@pytest.fixture
def secrets(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store that is reached with credentials which can be recognised."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return s3_url


def test_no_credential_is_pickled_stored_or_logged(
    secrets: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    job, store = tiny_job(tmp_path), open_store(secrets)
    store.probe()
    plan = make_plan(resolve(job, store), store, workers=1)
    sent = [pickle.dumps((run_task, task, store)) for task in (*plan.train, *plan.measure)]
    assert sent
    assert_holds_no_secret(b"".join(sent), "what is sent to a worker")
    done = call("run", str(tmp_path / "job.toml"), "--ray", "none", "--store", secrets)
    assert done.exit_code == 0, done.output
    assert_holds_no_secret(done.output.encode() + caplog.text.encode(), "a message or log")
    assert_holds_no_secret(everything_in(secrets), "the store")
    assert len(committed_runs(store)) == 1


@pytest.mark.parametrize("with_scheme", [True, False])
@pytest.mark.parametrize(
    "words", [("status",), ("logs", "3f"), ("cancel", "3f"), ("submit", "{job}"), ("run", "{job}")]
)
def test_no_message_names_the_password_of_an_address(
    tmp_path: Path, words: tuple[str, ...], with_scheme: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # on data that comes with a library: a job on this machine's files is not submitted
    write_job(tmp_path / "job.toml")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{closed.getsockname()[1]}"
        address = f"{'http://' if with_scheme else ''}bob:s3cret-p@ss@{host}"
        command = [word.format(job=tmp_path / "job.toml") for word in words]
        command += ["--store", str(tmp_path / "store")]
        done = [call(*command, "--ray", address)]
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", address)
        if words[0] in ("logs", "cancel", "submit"):
            done.append(call(*command))
    for one in done:
        assert one.exit_code == 2, one.output
        assert not any(part in one.output for part in ("bob", "s3cret", "ss@")), one.output
        assert host in one.output


def test_what_a_cluster_is_asked_next_is_printed_without_a_password() -> None:
    address = "http://bob:s3cret@head:8265"
    with pytest.raises(
        StoreError, match=r"^http://head:8265: '3f' .* `neuron-census status --ray http://head:8265` lis"
    ):
        chosen([], "3f", address=address, store=None)
    with pytest.raises(StoreError, match=r"^http://head:8265: no run was submitted there"):
        print_submissions([], address, Console())


@pytest.mark.slow
@pytest.mark.real
def test_no_credential_reaches_ray_or_prefect(secrets: str, prefect: Prefect, tmp_path: Path) -> None:
    tiny_job(tmp_path)
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as temporary:
        environment = {**os.environ, "RAY_TMPDIR": temporary, "PREFECT_API_URL": prefect.api}
        environment |= {"PREFECT_HOME": str(tmp_path / "home"), "PREFECT_LOGGING_LEVEL": "DEBUG"}
        command = [sys.executable, "-m", "pipeline.cli", "run", str(tmp_path / "job.toml"), "--ray", "local"]
        done = subprocess.run([*command, "--prefect", "--store", secrets], env=environment, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        assert_holds_no_secret(done.stdout + done.stderr, "a message")
        logs = [path for path in Path(temporary).rglob("*") if path.is_file()]
        assert any("raylet" in path.name for path in logs)
        for path in logs:
            assert_holds_no_secret(path.read_bytes(), f"Ray's {path.name}")
    assert_holds_no_secret(everything_in(secrets), "the store")
    for home in (tmp_path / "home", prefect.home):
        for path in home.rglob("*"):
            if path.is_file():
                assert_holds_no_secret(path.read_bytes(), f"Prefect's {path.name}")
    assert any(path.suffix == ".db" for path in prefect.home.rglob("*"))
