"""Run tasks on a pool of Ray's workers: which worker is at which task, and what its calls come to.

Layer 5.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import ray

from pipeline.address import LOCAL, NONE
from pipeline.cluster.connection import connect, own_session, own_signals
from pipeline.cluster.pool import Pool
from pipeline.cluster.reason import last_line
from pipeline.cluster.workers import lacking, start_worker, workers_asked_for
from pipeline.errors import CensusError, JobError, breaks_the_process
from pipeline.executor import Executor, InlineExecutor, Lost
from pipeline.job_sections import Resources
from pipeline.schedule import Schedule

T = TypeVar("T")
R = TypeVar("R")

# never block longer: a signal is served between two looks at the receipts
POLL_S = 0.5


class _Map:
    """One pass over tasks: which worker is at which of them, and what their calls came to."""

    def __init__(self, pool: Pool, function: Callable[[Any], Any], tasks: Sequence[Any], *, retries: int) -> None:
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
        if isinstance(error, ray.exceptions.RayTaskError) and not breaks_the_process(error.cause):
            self._pool.give_back(worker)
            if isinstance(error.cause, CensusError):
                raise error.cause from error
        else:
            self._pool.drop(worker)
        tries = self._schedule.came_to_nothing(number)
        return f"{tries} tries came to nothing, the last with {last_line(error)}" if tries else None


class RayExecutor:
    """Maps over a pool of resident workers, one call in flight for each."""

    def __init__(self, pool: Pool, *, retries: int) -> None:
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
            self._pool.rest()


@contextmanager
def executor_at(
    address: str, resources: Resources, note: Callable[[str], None] = lambda text: None
) -> Iterator[Executor]:
    """The executor that an address names: `none` runs in this process, `local` or a cluster's address on Ray.

    JobError where workers on this machine ask for what it lacks. A cluster may start machines that have it: `note` is
    told what is waited for.
    """
    if address in (NONE, LOCAL) and resources.gpus_per_worker:
        from pipeline.devices import expect_gpus  # torch, which a driver on the CPU does not need here

        expect_gpus(resources)
    if address == LOCAL:
        from pipeline.devices import expect_room  # as above

        expect_room(resources)
    if address == NONE:
        yield InlineExecutor()
        return
    with ray_executor(address, resources, note) as executor:
        yield executor


@contextmanager
def ray_executor(
    address: str, resources: Resources, note: Callable[[str], None] = lambda text: None
) -> Iterator[RayExecutor]:
    """An executor on Ray: `local` starts an embedded one, anything else is the address of a running cluster.

    StoreError (the operator must act) if the address does not answer, JobError if an embedded one could never hold a
    worker; of a cluster that cannot yet, `note` is told. Leaving it stops all work at once.
    """
    try:
        with own_signals():
            connect(address, resources)
        session = own_session(address)
        if address == LOCAL and (said := lacking(resources)):
            raise JobError(f"{said}; ask for less under [resources]")
        pool = Pool(
            partial(start_worker, resources),
            partial(lacking, resources),
            size=workers_asked_for(resources),
            retries=resources.retries,
            note=note,
        )
        pool.fill()
        try:
            yield RayExecutor(pool, retries=resources.retries)
        finally:
            pool.close()
    finally:
        with own_signals():
            ray.shutdown()
    # only now: where something was raised its logs may say more
    if session is not None:
        shutil.rmtree(session, ignore_errors=True)
