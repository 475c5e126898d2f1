"""Run tasks on Ray: the only file that imports it, and nothing below ever sees it.

Layer 5. A pool of resident workers takes stateless calls, one at a time each: a worker that died is replaced by a new
one with nothing but what its tasks load, and a call may run twice, so nothing is accumulated across calls; results go
to the store, receipts come back. Credentials are those of each machine: none is sent.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, NamedTuple, TypeVar

# uv would start every worker through `uv run`
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray

from pipeline.address import LOCAL, NONE, knock, unanswered
from pipeline.errors import CensusError, StoreError
from pipeline.executor import Executor, InlineExecutor, Lost
from pipeline.job import Resources
from pipeline.schedule import Schedule

T = TypeVar("T")
R = TypeVar("R")

# never block longer: a signal is served between two looks at the receipts
POLL_S = 0.5
# a cluster that scales up takes minutes to give the first worker
START_TIMEOUT_S = 600.0


class _Worker:
    """A resident process: imports and loaded models stay warm between calls."""

    def __init__(self, gpu_share: float) -> None:
        if 0 < gpu_share < 1:
            from pipeline.devices import limit_gpu  # torch, which a worker without tasks does not need

            limit_gpu(gpu_share)

    def ready(self) -> None:
        """Answer as soon as the process runs."""

    def call(self, function: Callable[[T], R], task: T) -> R:
        return function(task)


class _Pool:
    """As many workers as were asked for: those that died are replaced, and a new one counts once it has answered."""

    def __init__(self, start: Callable[[], Any], *, size: int, retries: int) -> None:
        self.size = size
        self.idle: list[Any] = []
        self._start = start
        self._retries = retries
        self._failures = 0
        self._starting: dict[Future[Any], Any] = {}
        self._busy: set[Any] = set()
        self._alone_since = time.monotonic()

    def fill(self) -> None:
        """Start workers in place of those that are gone."""
        for _ in range(self.size - len(self.idle) - len(self._busy) - len(self._starting)):
            worker = self._start()
            self._starting[worker.ready.remote().future()] = worker

    @property
    def starting(self) -> list[Future[Any]]:
        """What is done as soon as one of the new workers is ready, or cannot be."""
        return list(self._starting)

    def admit(self) -> None:
        """Count in the new workers that have answered. StoreError if none comes to life."""
        for future in [future for future in self._starting if future.done()]:
            worker = self._starting.pop(future)
            error = future.exception()
            if error is None:
                self.idle.append(worker)
                self._failures = 0
                continue
            self._failures += 1
            if self._failures > self._retries:
                raise StoreError(f"Ray cannot start a worker: {_last_line(error)}") from error
        if self.idle or self._busy:
            self._alone_since = time.monotonic()
        elif time.monotonic() - self._alone_since > START_TIMEOUT_S:
            raise StoreError(
                f"no worker started within {START_TIMEOUT_S:.0f} s: the cluster has {_shown(ray.cluster_resources())}, "
                f"of which {_shown(ray.available_resources())} are free; ask for less under [resources], or wait"
            )

    def take(self) -> Any:
        """An idle worker, busy from now on."""
        worker = self.idle.pop()
        self._busy.add(worker)
        return worker

    def give_back(self, worker: Any) -> None:
        """The worker has answered."""
        self._busy.remove(worker)
        self.idle.append(worker)

    def drop(self, worker: Any) -> None:
        """The worker is dead, or is to be."""
        self._busy.discard(worker)
        ray.kill(worker)

    def close(self) -> None:
        """Kill every worker, whatever it is at."""
        for worker in [*self.idle, *self._busy, *self._starting.values()]:
            ray.kill(worker)


class _Map:
    """One pass over tasks: which worker is at which of them, and what their calls came to."""

    def __init__(self, pool: _Pool, function: Callable[[Any], Any], tasks: Sequence[Any], *, retries: int) -> None:
        self._pool = pool
        self._function = ray.put(function)
        self._tasks = tasks
        self._schedule = Schedule(len(tasks), retries=retries)
        self._calls: dict[Future[Any], tuple[int, Any]] = {}

    def outcomes(self) -> Iterator[tuple[int, Any]]:
        """Yield each task's number with its receipt, or that it is lost."""
        while not self._schedule.finished:
            self._pool.fill()
            self._pool.admit()
            self._hand_out()
            done, _ = wait([*self._calls, *self._pool.starting], timeout=POLL_S, return_when=FIRST_COMPLETED)
            for future in done & self._calls.keys():
                number, worker = self._calls.pop(future)
                error = future.exception()
                if error is not None:
                    if reason := self._lost(number, worker, error):
                        yield number, Lost(reason)
                    continue
                self._pool.give_back(worker)
                if self._schedule.answered(number):
                    yield number, future.result()

    def abandon(self) -> None:
        """Kill the workers whose answers nobody waits for any more: a call that runs cannot be stopped otherwise."""
        for _, worker in self._calls.values():
            self._pool.drop(worker)
        self._calls.clear()

    def _hand_out(self) -> None:
        while self._pool.idle and (number := self._schedule.take()) is not None:
            worker = self._pool.take()
            call = worker.call.remote(self._function, self._tasks[number])
            self._calls[call.future()] = (number, worker)

    def _lost(self, number: int, worker: Any, error: BaseException) -> str | None:
        """Have the task tried again, or say why it is lost; raises what a person must act on."""
        if isinstance(error, ray.exceptions.RayTaskError):
            self._pool.give_back(worker)
            if isinstance(error.cause, CensusError):
                raise error.cause from error
        else:
            self._pool.drop(worker)
        tries = self._schedule.came_to_nothing(number)
        return f"{tries} tries came to nothing, the last with {_last_line(error)}" if tries else None


class RayExecutor:
    """Maps over a pool of resident workers, one call in flight for each."""

    def __init__(self, pool: _Pool, *, retries: int) -> None:
        self._pool = pool
        self._retries = retries

    @property
    def workers(self) -> int:
        """How many tasks run at a time."""
        return self._pool.size

    def map(self, function: Callable[[T], R], tasks: Sequence[T]) -> Iterator[tuple[int, R | Lost]]:
        """Yield receipts as calls finish; what a dead worker or a defect took is tried again `retries` times."""
        work = _Map(self._pool, function, tasks, retries=self._retries)
        try:
            yield from work.outcomes()
        finally:
            work.abandon()


@contextmanager
def executor_at(address: str, resources: Resources) -> Iterator[Executor]:
    """The executor that an address names: `none` runs in this process, `local` or a cluster's address on Ray.

    JobError where workers on this machine ask for GPUs that it lacks. A cluster may start machines that have them.
    """
    if address in (NONE, LOCAL) and resources.gpus_per_worker:
        from pipeline.devices import expect_gpus  # torch, which a driver on the CPU does not need here

        expect_gpus(resources)
    if address == NONE:
        yield InlineExecutor()
        return
    with ray_executor(address, resources) as executor:
        yield executor


@contextmanager
def ray_executor(address: str, resources: Resources) -> Iterator[RayExecutor]:
    """An executor on Ray: `local` starts an embedded one, anything else is the address of a running cluster.

    StoreError (the operator must act) if the address does not answer. Leaving it stops all work at once.
    """
    with _own_signals():
        _connect(address, resources)
    try:
        pool = _Pool(lambda: _start(resources), size=_size(resources), retries=resources.retries)
        pool.fill()
        try:
            yield RayExecutor(pool, retries=resources.retries)
        finally:
            pool.close()
    finally:
        with _own_signals():
            ray.shutdown()


class Submission(NamedTuple):
    """A job of a cluster that is a run into a store, as the cluster describes it; times in UTC."""

    id: str
    run: str
    store: str
    status: str
    message: str
    started: datetime | None
    ended: datetime | None

    @property
    def is_alive(self) -> bool:
        """Whether it is at work, or will be."""
        return self.status in ("PENDING", "RUNNING")


class JobServer:
    """The jobs of a cluster, at the http:// address of its dashboard. StoreError if that does not answer."""

    def __init__(self, address: str) -> None:
        if not address.startswith(("http://", "https://")):
            raise StoreError(f"{address}: jobs go to the address of the cluster's dashboard, http://HOST:8265")
        self._address = address
        from ray.job_submission import JobSubmissionClient  # 0.5 s that only a submission needs

        # Ray would prefer these to the address that was asked for
        with _unset("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"), self._answering():
            self._client = JobSubmissionClient(address)

    def submissions(self) -> list[Submission]:
        """Every job that is a run, in no order."""
        with self._answering():
            jobs = self._client.list_jobs()
        return [_submission(job) for job in jobs if "neuron-census run" in (job.metadata or {})]

    def submit(self, name: str, *, run: str, store: str, command: str, folder: str) -> bool:
        """Have a command executed in a copy of a folder; False if a job has this name already."""
        metadata = {"neuron-census run": run, "neuron-census store": store}
        with self._answering():
            try:
                self._client.submit_job(
                    entrypoint=command, submission_id=name, metadata=metadata, runtime_env={"working_dir": folder}
                )
            except RuntimeError as error:
                if "already exists" not in str(error):
                    raise
                return False
        return True

    def stop(self, name: str) -> None:
        """Ask a job to stop."""
        with self._answering():
            self._client.stop_job(name)

    def log(self, name: str, *, follow: bool) -> Iterator[str]:
        """What a job has printed, in pieces; until it ends if `follow`."""
        with self._answering():
            if not follow:
                yield self._client.get_job_logs(name)
                return
            pieces = self._client.tail_job_logs(name)
            with asyncio.Runner() as runner:
                while (piece := runner.run(_next(pieces))) is not None:
                    yield piece

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except ray.exceptions.AuthenticationError as error:
            raise StoreError(
                f"{self._address}: asks for another token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
            ) from error
        except (ConnectionError, RuntimeError, OSError) as error:
            raise StoreError(
                f"Ray's dashboard at {self._address} does not answer as one: {_last_line(error)}. "
                "It needs ray[default] on the head: pip install 'neuron-census[cluster]'"
            ) from error


async def _next(pieces: AsyncIterator[str]) -> str | None:
    return await anext(pieces, None)


def _submission(job: Any) -> Submission:
    def when(milliseconds: int | None) -> datetime | None:
        return datetime.fromtimestamp(milliseconds / 1000, UTC) if milliseconds else None

    run, store = job.metadata["neuron-census run"], job.metadata.get("neuron-census store", "")
    started, ended = when(job.start_time), when(job.end_time)
    return Submission(job.submission_id, run, store, str(job.status.value), job.message or "", started, ended)


@contextmanager
def _unset(*names: str) -> Iterator[None]:
    """Take variables out of the environment for a while."""
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


def _start(resources: Resources) -> Any:
    # never restarted by Ray: the pool starts another one, and knows when it is ready
    memory = {"memory": int(resources.memory_gib * 2**30)} if resources.memory_gib else {}
    options: dict[str, Any] = {"num_cpus": resources.cpus_per_worker, "num_gpus": resources.gpus_per_worker, **memory}
    return ray.remote(max_restarts=0, max_task_retries=0, **options)(_Worker).remote(resources.gpus_per_worker)


def _size(resources: Resources) -> int:
    """Workers that were asked for, or as many as the cluster has room for now."""
    if resources.workers:
        return resources.workers
    return max(1, sum(_room(node["Resources"], resources) for node in ray.nodes() if node["Alive"]))


def _room(there: Mapping[str, float], resources: Resources) -> int:
    """How many workers one node has room for; a share of a GPU is all of the same one."""
    share = resources.gpus_per_worker
    room = [int(there.get("CPU", 0) // resources.cpus_per_worker)]
    if 0 < share < 1:
        # in Ray's steps: of 0.1 there are ten
        room.append(int(there.get("GPU", 0)) * int(10_000 // round(share * 10_000)))
    elif share:
        room.append(int(there.get("GPU", 0) // share))
    if resources.memory_gib:
        room.append(int(there.get("memory", 0) // (resources.memory_gib * 2**30)))
    return min(room)


@contextmanager
def _own_signals() -> Iterator[None]:
    """Put back the SIGTERM handler that was there: Ray's would take the place of the one that cancels a flow."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _connect(address: str, resources: Resources) -> None:
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    knock(address)
    try:
        if address == LOCAL:
            # Ray's ports are open to the network: it asks for a token, and this one nobody else has
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
            cpus = max(resources.workers * resources.cpus_per_worker, os.cpu_count() or 1)
            ray.init(address=LOCAL, num_cpus=cpus, include_dashboard=False, _temp_dir=_temporary(), **quiet)
            return
        # how often, not how many seconds: Ray would take a quarter of an hour to give up a wrong port
        os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "1")
        ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        raise unanswered(address, _last_line(error)) from error


def _temporary() -> str:
    # a socket's path has at most 107 characters, of which Ray needs 70: TMPDIR may be too long
    return os.environ.get("RAY_TMPDIR") or f"/tmp/neuron-census-{os.getuid()}"


def _last_line(error: BaseException) -> str:
    """The line of Ray's long messages that says what happened."""
    cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else None
    text = f"{type(cause).__name__}: {cause}" if cause is not None else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1 if cause is None and "Traceback" in text else 0].rstrip(".")


def _shown(resources: dict[str, float]) -> str:
    return ", ".join(f"{resources.get(name, 0):g} {name}s" for name in ("CPU", "GPU"))
