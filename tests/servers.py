"""Real servers for tests, one of each for the session, each stopped by its own handle and never by name."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
from botocore.config import Config
from botocore.session import get_session

T = TypeVar("T")

BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def free_pair() -> int:
    """A port that is free and so is the one 10,000 above it; below those that are given out by themselves."""
    while True:
        port = random.randrange(10_000, 22_000)
        with socket.socket() as lower, socket.socket() as upper, suppress(OSError):
            lower.bind(("127.0.0.1", port))
            upper.bind(("127.0.0.1", port + 10_000))
            return port


def wait_until(claim: Callable[[], object], *, timeout_s: float, every_s: float = 0.05) -> None:
    end = time.monotonic() + timeout_s
    while not claim():
        assert time.monotonic() < end, f"not within {timeout_s} s"
        time.sleep(every_s)


def wait_for(attempt: Callable[[], T], *, timeout_s: float, every_s: float = 0.2) -> T:
    """What an attempt comes to as soon as it raises nothing; what the last one raised if that takes too long."""
    end = time.monotonic() + timeout_s
    while True:
        try:
            return attempt()
        except Exception as error:
            if time.monotonic() > end:
                raise AssertionError(f"not within {timeout_s} s: {type(error).__name__}: {error}") from error
        time.sleep(every_s)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Server:
    """A process with its children, ended together."""

    def __init__(self, *command: str, environment: dict[str, str] | None = None, log: Path | None = None) -> None:
        output = log.open("ab") if log else subprocess.DEVNULL
        self.process = subprocess.Popen(
            command, env={**os.environ, **(environment or {})}, stdout=output, stderr=output, start_new_session=True
        )

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def stop(self, timeout_s: float = 15) -> int:
        self.process.terminate()
        try:
            return self.process.wait(timeout_s)
        finally:
            self.kill()


class RayNode(Server):
    """A head, or a further node of the cluster of a head."""

    def __init__(self, *, head: str | None = None, cpus: int = 2) -> None:
        self.port = free_port()
        self.jobs = f"http://127.0.0.1:{(dashboard_port := free_port())}"
        # sockets have short paths
        self.folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
        role = ["--address", head] if head else ["--head", f"--port={self.port}", f"--temp-dir={self.folder}"]
        dashboard = ["--include-dashboard=true", f"--dashboard-port={dashboard_port}"]
        super().__init__(
            # a GPU in Ray's books only: what it gives to whom needs none
            *[str(BIN / "ray"), "start", "--block", f"--num-cpus={cpus}", "--num-gpus=1", "--disable-usage-stats"],
            *role,
            *([] if head else dashboard),
            f"--dashboard-agent-listen-port={free_port()}",
            "--node-ip-address=127.0.0.1",
            "--object-store-memory=100000000",
            # what is submitted to it finds the command there
            environment={"PATH": f"{BIN}:{os.environ['PATH']}"},
            log=Path(self.folder, "log"),
        )
        self.address = head or f"127.0.0.1:{self.port}"


def children(pid: int) -> list[int]:
    """Every process below one, by the kernel's own record."""
    own: list[int] = []
    # a process or thread may end while it is looked at
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):
                own += [int(child) for child in (task / "children").read_text().split()]
    return own + [below for child in own for below in children(child)]


def workers_of(head: RayNode) -> list[int]:
    """The processes of the workers that executors have started on a node."""
    pids = []
    for pid in children(head.process.pid):
        with suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::_Worker"):
                pids.append(pid)
    return sorted(pids)


class Seaweed:
    """A real S3 server on a directory, which survives its being killed; credentials may be any."""

    START_TIMEOUT_S = 60.0
    STARTS = 2

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.directory = directory
        self.ports = [free_pair() for _ in range(4)]
        self.server: Server | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}"

    @property
    def log(self) -> str:
        """The end of what the server said."""
        lines = (self.directory / "log").read_text(errors="replace").splitlines()
        return "\n".join(line[:300] for line in lines[-40:])

    def start(self) -> None:
        """Serve from the ports it has, until a put has been read back; launched anew where that takes too long."""
        for left in reversed(range(self.STARTS)):
            self._launch()
            try:
                wait_for(self._round_trip, timeout_s=self.START_TIMEOUT_S)
                return
            except AssertionError as error:
                self.kill()
                if not left:
                    raise AssertionError(f"the S3 server does not serve: {error}; its log ends\n{self.log}") from error

    def kill(self) -> None:
        assert self.server is not None
        self.server.kill()

    def close(self) -> None:
        """Kill the server and remove the sockets that it leaves in a directory nobody can choose."""
        self.kill()
        for port in self.ports:
            for pattern in (f"seaweedfs-*-{port}.sock", f"seaweedfs-*-{port + 10_000}.sock"):
                for left in Path("/tmp").glob(pattern):
                    left.unlink(missing_ok=True)

    def create_bucket(self, name: str) -> None:
        """Make a bucket, unless an earlier attempt has made it and was not told so."""
        client = self._client()
        with suppress(client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists):
            client.create_bucket(Bucket=name)

    def _launch(self) -> None:
        roles = ("s3", "master", "volume", "filer")
        ports = [f"-{role}.port={port}" for role, port in zip(roles, self.ports, strict=True)]
        # a bucket's first object grows volumes for it alone, seven unless told: of 20 the fourth bucket gets none
        volumes = ["-master.volumeSizeLimitMB=64", "-volume.max=2000", "-volume.minFreeSpace=100MiB"]
        closed = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false"]
        closed += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
        # it takes credentials that it finds in its environment for those of its only user: a client's are no such thing
        unset = [f"--unset={name}" for name in os.environ if name.startswith("AWS_")]
        self.server = Server(
            *["env", *unset, str(BIN / "weed"), "-logtostderr=true", "server", f"-dir={self.directory}", "-s3"],
            *[*ports, *volumes, *closed, "-master.electionTimeout=1s"],
            environment={"WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"},
            log=self.directory / "log",
        )

    def _round_trip(self) -> None:
        assert self.server is not None
        if self.server.process.poll() is not None:
            # what failed to start does not start by being waited for
            self._launch()
        self.create_bucket("ready")
        client = self._client()
        client.put_object(Bucket="ready", Key="ready", Body=b"ready")
        assert client.get_object(Bucket="ready", Key="ready")["Body"].read() == b"ready"

    def _client(self) -> Any:
        config = Config(retries={"total_max_attempts": 1}, s3={"addressing_style": "path"}, read_timeout=20)
        return get_session().create_client(
            *["s3", "us-east-1"],
            endpoint_url=self.endpoint,
            aws_access_key_id="any",
            aws_secret_access_key="any-secret",
            config=config,
        )


def started_seaweed(directory: Path) -> Seaweed:
    """A server that serves: anew, elsewhere, if somebody took a port between its choice and its use."""
    for attempt in range(Seaweed.STARTS):
        server = Seaweed(directory / str(attempt))
        try:
            server.start()
            return server
        except AssertionError:
            server.close()
            if attempt == Seaweed.STARTS - 1:
                raise
    raise AssertionError("unreachable")


@pytest.fixture(scope="session")
def ray_head() -> Iterator[RayNode]:
    """The head of a Ray cluster of two CPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        head = RayNode()
        try:
            wait_until(lambda: answers(head.port), timeout_s=120)
            yield head
        finally:
            head.kill()


@pytest.fixture(scope="session")
def ray_cluster(ray_head: RayNode) -> str:
    """The address of a Ray cluster of two CPUs."""
    return ray_head.address


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    """A real S3 server, running, and the environment of every client pointed at it while a test has it."""
    server = started_seaweed(tmp_path_factory.mktemp("seaweed"))
    try:
        yield server
    finally:
        server.close()


@dataclass
class Prefect:
    """A real server; `client` speaks to it."""

    server: Server
    port: int
    home: Path

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"

    def ask(self, method: str, what: str, **body: Any) -> Any:
        """The server's answer; asked again, as its own client does, while it says that its database is busy (503)."""
        for pause_s in (1, 2, 4, 8, 0):
            answer = httpx.request(method, f"{self.api}/{what}", json=body if method == "POST" else None, timeout=30)
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                break
            time.sleep(pause_s)
        return answer.raise_for_status().json()


def start_prefect(home: Path) -> Prefect:
    port = free_port()
    environment = {"PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    command = [str(BIN / "prefect"), "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    return Prefect(Server(*command, environment=environment, log=home / "log"), port, home)


@pytest.fixture(scope="session")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prefect]:
    one = start_prefect(tmp_path_factory.mktemp("prefect"))
    try:
        wait_until(lambda: answers(one.port), timeout_s=120)
        yield one
    finally:
        one.server.kill()
