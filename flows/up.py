"""Keep a census up on this machine: a Prefect server, a schedule, and the worker that runs it, until told to stop.

Layer 6. The server listens on the loopback address only: it asks for no password. What a scheduled run does is the
flow `census`, so a night without new rows or models finds its run committed and ends; what is new is measured once.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import JobError, StoreError
from pipeline.job import load_job

if TYPE_CHECKING:
    from prefect.schedules import Schedule

POOL = "neuron-census"
# a night that lost its power holds its place, of which there is one: where the server forgets what it has lent when it
# ends, no later night would ever get it back
LEASES = {"PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem"}
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 20.0
NIGHTS_INTERVAL_S = 5.0
# the states of Prefect that a night ends in
ENDS = ["COMPLETED", "FAILED", "CRASHED", "CANCELLED"]


# looked up before there is a child, in which little may be called
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


@dataclass(frozen=True)
class Nightly:
    """What is run, where to, on which Ray, and when: `cron` in UTC."""

    job: str
    store: str
    ray: str = "local"
    cron: str = "0 2 * * *"

    @property
    def parameters(self) -> dict[str, str]:
        """The flow's: absolute, because a worker runs it in a directory of its own."""
        store = self.store if "://" in self.store else str(Path(self.store).expanduser().absolute())
        return {"job": str(Path(self.job).absolute()), "store": store, "ray": self.ray}


def up(nightly: Nightly, *, port: int = 4200, say: Callable[[str], None] = print) -> None:
    """Serve the schedule until SIGINT or SIGTERM, then end everything that was started. JobError, StoreError."""
    name = load_job(nightly.job).name
    api = f"http://127.0.0.1:{port}/api"
    # Prefect reads it once, when it is imported
    os.environ["PREFECT_API_URL"] = api
    schedule = schedule_of(nightly, name)
    told = threading.Event()
    _refuse_taken(api)
    with _until_told(told), _running("server", "start", "--host", "127.0.0.1", "--port", str(port)) as server:
        _wait_for(api, server, told)
        if told.is_set():
            return
        # of its own: what another job has left scheduled at this server is not run by this worker
        pool = f"{POOL}-{name}"
        with (
            _deployed(nightly, name, schedule, pool) as nights,
            _running("worker", "start", "--pool", pool, "--type", "process", "--limit", "1") as worker,
        ):
            say(f"job {name} runs at {nightly.cron!r} (UTC) into {nightly.store}; Prefect: {api[:-4]}; Ctrl-C ends it")
            while not told.wait(1.0):
                for part, process in (("server", server), ("worker", worker)):
                    if process.poll() is not None:
                        raise StoreError(f"Prefect's {part} ended by itself (exit code {process.returncode})")
                for news in nights.news():
                    say(news)


def schedule_of(nightly: Nightly, name: str) -> Schedule:
    """The schedule, if Prefect takes it and the job's name; JobError, before anything is started, if it does not."""
    from prefect.exceptions import InvalidNameError
    from prefect.schedules import Cron

    from flows.census import census

    try:
        schedule = Cron(nightly.cron)
    except ValueError:
        raise JobError(
            f"--cron {nightly.cron!r}: expected minute, hour, day, month and weekday, '0 2 * * *' say, in UTC"
        ) from None
    try:
        census.to_deployment(name=name, schedule=schedule)
    except InvalidNameError:
        raise JobError(
            f"{nightly.job}: name = {name!r}: expected a name without / % & < and >, which Prefect refuses"
        ) from None
    return schedule


class _Nights:
    """The nights of a deployment, each told once it has ended."""

    def __init__(self, deployment: Any) -> None:
        self._deployment = deployment
        self._told = {night.id for night in self._ended()}
        self._looked_s = time.monotonic()

    def news(self) -> list[str]:
        """A line for each night that has ended since, asked for now and then; nothing while the server is silent."""
        if time.monotonic() - self._looked_s < NIGHTS_INTERVAL_S:
            return []
        self._looked_s = time.monotonic()
        ended: list[Any] = []
        # the server's end is told by its process
        with suppress(Exception):
            ended = [night for night in self._ended() if night.id not in self._told]
        self._told |= {night.id for night in ended}
        return [
            f"{night.expected_start_time:%Y-%m-%d %H:%M} UTC: {night.state.name.lower()}"
            + (f": {night.state.message}" if night.state.message and not night.state.is_completed() else "")
            for night in reversed(ended)
        ]

    def _ended(self) -> list[Any]:
        from prefect.client.orchestration import get_client
        from prefect.client.schemas.filters import DeploymentFilter, FlowRunFilter
        from prefect.client.schemas.sorting import FlowRunSort

        of_it = DeploymentFilter.model_validate({"id": {"any_": [self._deployment]}})
        over = FlowRunFilter.model_validate({"state": {"type": {"any_": ENDS}}})
        with get_client(sync_client=True) as client:
            return client.read_flow_runs(
                deployment_filter=of_it, flow_run_filter=over, sort=FlowRunSort.END_TIME_DESC, limit=100
            )


@contextmanager
def _deployed(nightly: Nightly, name: str, schedule: Schedule, pool: str) -> Iterator[_Nights]:
    """The flow with its schedule at the server; paused behind it, or another server of this home would schedule it."""
    from prefect.client.orchestration import get_client

    deployment = deploy(nightly, name, schedule, pool)
    try:
        yield _Nights(deployment)
    finally:
        # a server that has ended schedules nothing
        with suppress(Exception), get_client(sync_client=True) as client:
            client.pause_deployment(deployment)


def deploy(nightly: Nightly, name: str, schedule: Schedule, pool: str = POOL) -> Any:
    """Register the flow with its schedule at the server of the environment, in place of one of the same name.

    Returns the id of the deployment.
    """
    from prefect.client.orchestration import get_client  # reads the address from the environment once
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.types.entrypoint import EntrypointType

    from flows.census import census

    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=pool, type="process"), overwrite=True)
    deployment: Any = census.to_deployment(
        name=name,
        schedule=schedule,
        parameters=nightly.parameters,
        work_pool_name=pool,
        # a night that is not over when the next begins is not run twice
        concurrency_limit=1,
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    return deployment.apply()


@contextmanager
def _running(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A Prefect command in a session of its own, so that Ctrl-C reaches only this process, which ends it in order."""
    environment = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1", **LEASES, **os.environ}
    process = subprocess.Popen(
        [sys.executable, "-m", "prefect", *command],
        env=environment,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_end_with_parent,
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _end_with_parent() -> None:
    """Have Linux send this process SIGTERM once the one that started it is gone, though it be killed."""
    if _PRCTL is not None:
        pr_set_pdeathsig = 1
        _PRCTL(pr_set_pdeathsig, signal.SIGTERM)


@contextmanager
def _until_told(told: threading.Event) -> Iterator[None]:
    before = {number: signal.signal(number, lambda *_: told.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _refuse_taken(api: str) -> None:
    from flows.census import answers  # imports prefect

    if answers(api):
        raise StoreError(f"a Prefect server answers at {api} already: end it, or choose another port with --port")


def _wait_for(api: str, server: subprocess.Popen[bytes], told: threading.Event) -> None:
    from flows.census import answers  # imports prefect

    end = time.monotonic() + START_TIMEOUT_S
    while not told.is_set() and not answers(api):
        if server.poll() is not None:
            raise StoreError(
                f"Prefect's server cannot be started at {api}: is its port taken? choose another with --port"
            )
        if time.monotonic() > end:
            raise StoreError(f"Prefect's server did not answer at {api} within {START_TIMEOUT_S:.0f} s")
        told.wait(0.2)
