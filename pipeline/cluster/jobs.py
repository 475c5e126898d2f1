"""Jobs of a cluster that are runs: given to its dashboard, listed, read and stopped there.

Layer 5.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, NamedTuple

import ray

from pipeline.address import shown
from pipeline.cluster.reason import last_line
from pipeline.errors import StoreError


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
            raise StoreError(f"{shown(address)}: jobs go to the address of the cluster's dashboard, http://HOST:8265")
        self._shown = shown(address)
        from ray.job_submission import JobSubmissionClient  # 0.5 s that only a submission needs

        # Ray would prefer these to the address that was asked for
        with _unset("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"), self._answering():
            self._client = JobSubmissionClient(address)

    def submissions(self) -> list[Submission]:
        """Every job that is a run, in no order."""
        with self._answering():
            jobs = self._client.list_jobs()
        return [_submission(job) for job in jobs if "neuron-census run" in (job.metadata or {})]

    def submission(self, name: str) -> Submission:
        """The job of that name."""
        found = next((one for one in self.submissions() if one.id == name), None)
        if found is None:
            raise StoreError(f"{self._shown}: no longer knows the job {name}; submit its run again")
        return found

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
                f"{self._shown}: asks for another token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
            ) from error
        except (ConnectionError, RuntimeError, OSError) as error:
            raise StoreError(
                f"Ray's dashboard at {self._shown} does not answer as one: {shown(last_line(error))}. "
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
