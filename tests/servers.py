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
from pathlib import Path

import pytest

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

    def __init__(self, *, head: str | None = None, cpus: int = 2, dashboard_port: int | None = None) -> None:
        self.port = free_port()
        # sockets have short paths
        self.folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
        role = ["--address", head] if head else ["--head", f"--port={self.port}", f"--temp-dir={self.folder}"]
        dashboard = [f"--include-dashboard={dashboard_port is not None}", f"--dashboard-port={dashboard_port or 8265}"]
        super().__init__(
            *[str(BIN / "ray"), "start", "--block", f"--num-cpus={cpus}", "--disable-usage-stats", *role],
            *([] if head else dashboard),
            "--node-ip-address=127.0.0.1",
            "--object-store-memory=100000000",
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

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ports = [free_pair() for _ in range(4)]
        self.endpoint = f"http://127.0.0.1:{self.ports[0]}"
        self.server: Server | None = None

    def start(self) -> None:
        roles = [
            f"-{role}.port={port}" for role, port in zip(("s3", "master", "volume", "filer"), self.ports, strict=True)
        ]
        fast = ["-master.electionTimeout=1s", "-master.volumeSizeLimitMB=64", "-volume.max=20"]
        closed = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false"]
        closed += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
        # it takes credentials that it finds in its environment for those of its only user: a client's are no such thing
        unset = [f"--unset={name}" for name in os.environ if name.startswith("AWS_")]
        command = ["env", *unset, str(BIN / "weed"), "-logtostderr=true", "server", f"-dir={self.directory}", "-s3"]
        self.server = Server(*command, *roles, *fast, *closed, log=self.directory / "log")
        wait_until(lambda: answers(self.ports[0]), timeout_s=60)

    def kill(self) -> None:
        assert self.server is not None
        self.server.kill()


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
    server = Seaweed(tmp_path_factory.mktemp("seaweed"))
    server.start()
    yield server
    server.kill()
