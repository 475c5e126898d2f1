"""A server that takes requests and never answers: what is asked of it ends, and so does a driver that is told to."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import s3fs

from pipeline import filesystems
from pipeline import store as store_module
from pipeline.errors import StoreError
from pipeline.hashing import sha256
from pipeline.inputs import list_inputs
from pipeline.store import Store, open_store
from tests.command_line import command
from tests.durability.proxy import FaultyProxy
from tests.durability.schedules import tiny_job
from tests.servers import wait_until

TRIES = filesystems.TRIES
# each with how often a server is asked that has never answered: botocore's own three times for each would be minutes
REQUESTS: dict[str, tuple[Callable[[Store], object], int]] = {
    "put": (lambda store: store.put_once("k", b"x"), TRIES),
    # more than fits into what the system keeps of a connection
    "large put": (lambda store: store.put_once("k", bytes(32 << 20)), TRIES),
    # s3fs repeats its reads, and each time the request
    "get": (lambda store: store.get("k"), TRIES**2),
    "range": (lambda store: store.get_range("k", 0, 1), TRIES**2),
    "listing": (lambda store: store.keys("runs/"), TRIES),
    "folders": (lambda store: store.folders("runs/"), TRIES),
    "delete": (lambda store: store.remove("k"), TRIES),
}


class Silent:
    """A server that accepts connections and says nothing, or nothing after the "100 Continue" that it is asked for."""

    def __init__(self, *, continues: bool) -> None:
        self.continues = continues
        self.connections: list[socket.socket] = []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            self.connections.append(connection)
            if self.continues and b"100-continue" in connection.recv(4096):
                connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def close(self) -> None:
        for one in (self._listening, *self.connections):
            one.close()


@pytest.fixture(params=[False, True], ids=["silent", "continues"])
def silent(request: pytest.FixtureRequest, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Silent]:
    """A silent server to which the environment points, and limits of a fraction of a second."""
    server = Silent(continues=request.param)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    impatient(monkeypatch)
    yield server
    server.close()


def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_MAX_ATTEMPTS", raising=False)
    monkeypatch.setattr(s3fs.S3FileSystem, "read_timeout", 0.3)
    monkeypatch.setattr(filesystems, "SENDING_S", 0.3)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", REQUESTS)
def test_every_request_comes_to_an_end(silent: Silent, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ask, times = REQUESTS[what]
    monkeypatch.setattr(store_module, "LONGEST_S", 0.0)
    with pytest.raises(StoreError, match=r"the server does not answer \(AnswerTimeout\): check AWS_ENDPOINT_URL"):
        ask(open_store("s3://bucket/x"))
    assert len(silent.connections) == times


@pytest.mark.timeout(60)
def test_inputs_that_are_waited_for_come_to_an_end(silent: Silent) -> None:
    with pytest.raises(StoreError, match=r"the server does not answer \(AnswerTimeout\)"):
        list_inputs("s3://bucket/rows/*.parquet")
    assert len(silent.connections) <= 3 * TRIES


@pytest.mark.timeout(60)
def test_what_has_answered_is_asked_for_longer(silent: Silent, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store("s3://bucket/answered")
    monkeypatch.setattr(store_module, "LONGEST_S", 0.0)
    monkeypatch.setattr(store_module, "PATIENT_ATTEMPTS", 2)
    monkeypatch.setattr(store_module, "_answered", {store.url})
    with pytest.raises(StoreError, match="does not answer"):
        store.keys("")
    assert len(silent.connections) == 2 * TRIES


@pytest.fixture
def proxy(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    one = FaultyProxy(s3_server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", one.endpoint)
    yield one
    one.close()


def test_a_server_that_is_silent_for_a_while_is_waited_for(
    s3_url: str, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient(monkeypatch)
    silent_for = [2]

    def fault(method: str, path: str) -> str | None:
        silent_for[0] -= 1
        return "silent" if silent_for[0] >= 0 else None

    monkeypatch.setattr(proxy, "fault", fault)
    store = open_store(s3_url)
    assert store.put_once("k", b"x") == sha256(b"x")
    silent_for[0] = 2
    assert store.get("k") == b"x"
    silent_for[0] = 2
    assert store.keys("") == ["k"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("twice", [False, True])
def test_a_driver_is_ended_while_a_request_hangs(
    s3_url: str, proxy: FaultyProxy, tmp_path: Path, *, number: int, code: int, twice: bool
) -> None:
    tiny_job(tmp_path)
    hanging = threading.Event()

    def fault(method: str, path: str) -> str | None:
        # a cell, which another thread than the first stores
        if method != "PUT" or "/states/" not in path:
            return None
        hanging.set()
        return "silent"

    proxy.fault = fault  # type: ignore[method-assign]
    job = str(tmp_path / "job.toml")
    process = subprocess.Popen(
        command("run", job, "--store", s3_url, "--ray", "none"), stderr=subprocess.PIPE, text=True
    )
    try:
        wait_until(hanging.is_set, timeout_s=120)
        time.sleep(1)
        os.kill(process.pid, number)
        start = time.monotonic()
        if twice:
            time.sleep(1)
            os.kill(process.pid, number)
        _, said = process.communicate(timeout=60)
        took_s = time.monotonic() - start
    finally:
        process.kill()
    assert process.returncode == code, said
    assert said.splitlines()[-1] == "interrupted; run the same command again to go on"
    assert took_s < (5 if twice else 20)
