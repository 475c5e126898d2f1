"""Runs as jobs of a Ray cluster: submitted once into a store, looked at, read and cancelled from anywhere.

Layer 5. A job outlives whoever submits it, and is the command `neuron-census run` on the cluster, with the cluster's
own credentials: none travels. The job file does; what it names must be where every node finds it.
"""

from __future__ import annotations

import shlex
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.address import shown
from pipeline.cluster.jobs import JobServer, Submission
from pipeline.errors import JobError, StoreError
from pipeline.hashing import sha256
from pipeline.job import Job
from pipeline.kernels import choose
from pipeline.named import checked_job
from pipeline.registry import sources
from pipeline.resolve import resolve
from pipeline.run import expect_fit, is_committed
from pipeline.store import Store, open_store

CANCEL_TIMEOUT_S = 60.0
POLL_S = 0.2


@dataclass(frozen=True)
class Submitted:
    """A run at a cluster: its job, or None if the store holds its commit; `is_new` if this call submitted it.

    `remark` says why the cluster may call the run otherwise: the kernel is part of its id, and is chosen there.
    """

    run: str
    job: str | None
    is_new: bool
    remark: str | None = None


def submit(path: str, url: str, address: str) -> Submitted:
    """Submit a job file's run to the cluster at `address`, or find the job that is at it already.

    JobError where only this machine has what the job names, StoreError where store or cluster do not answer.
    """
    store = open_store(url)
    job = checked_job(path, store)
    _refuse_own_files(job, url)
    server = JobServer(address)
    resolved = resolve(job, store)
    run = resolved.run
    if is_committed(resolved, store):
        return Submitted(run, None, is_new=False)
    expect_fit(resolved, store)
    earlier = [one for one in server.submissions() if (one.run, one.store) == (run, store.url)]
    if alive := [one for one in earlier if one.is_alive]:
        return Submitted(run, alive[0].id, is_new=False)
    # a function of what was there: of two who submit at once, one is refused and finds the other's
    name = f"census-{run}-{sha256(store.url.encode())[:6]}-{len(earlier) + 1}"
    is_new = _sent(server, name, run=run, path=Path(path), store=store)
    # while the job starts, which takes longer: it need not count and hash what was counted and hashed here
    resolved.findings.release()
    lacking = choose.remark(resolved.kernel, resolved.device)
    remark = f"on this machine {lacking}; where the cluster has a faster one, the run has another id in the store"
    return Submitted(run, name, is_new=is_new, remark=remark if lacking else None)


def _sent(server: JobServer, name: str, *, run: str, path: Path, store: Store) -> bool:
    command = ["neuron-census", "run", path.name, "--store", store.url, "--ray", "auto"]
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(path, folder)
        return server.submit(name, run=run, store=store.url, command=shlex.join(command), folder=folder)


def _refuse_own_files(job: Job, url: str) -> None:
    if "://" not in url and not Path(url).is_absolute():
        raise StoreError(
            f"store {url}: a directory of this machine; a cluster needs s3://bucket/prefix, or an absolute path that "
            "every node has"
        )
    named = {f"data.{name}.url": spec.url for name, spec in job.data.items()}
    named |= {
        f"data.{name}.options.{option}": spec.options.get(option)
        for name, spec in job.data.items()
        for option in sources()[spec.source].files
    }
    named |= {f"models[{index}].load.url": (spec.load or {}).get("url") for index, spec in enumerate(job.models)}
    for key, location in named.items():
        if location and "://" not in location and not Path(location).is_absolute():
            raise JobError(
                f"{job.place}: {key} = {location!r} is relative to the job file, which is copied to the cluster alone; "
                "give a URL (s3://…), or an absolute path that every node has"
            )


def submissions(address: str, run: str | None = None) -> list[Submission]:
    """The jobs of a cluster that are runs, the latest last; of one run if the beginning of its id is given."""
    found = [one for one in JobServer(address).submissions() if one.run.startswith(run or "")]
    return sorted(found, key=lambda one: (one.started is not None, one.started, one.id))


def latest(address: str, run: str, *, url: str | None = None) -> Submission:
    """The last job of the run whose id begins with `run`, into the store at `url` if given; see `chosen`."""
    store = None if url is None else open_store(url).url
    return chosen(submissions(address, run), run, address=address, store=store)


def chosen(found: Sequence[Submission], run: str, *, address: str, store: str | None) -> Submission:
    """Of jobs, the latest last, the one to be read or stopped: one that is at work before those that have ended.

    All are of runs whose ids begin with `run`, and only those into `store` count if it is given. StoreError if there is
    none, or if it could be one of several runs or several stores'.
    """
    asked, known = [one for one in found if store in (None, one.store)], shown(address)
    runs = sorted({one.run for one in asked})
    if len(runs) != 1:
        listed = f"several runs: {', '.join(runs)}" if runs else "no run that was submitted"
        into = f" into {store}" if store is not None else ""
        raise StoreError(
            f"{known}: {run!r} begins the id of {listed}{into}; `neuron-census status --ray {known}` lists them"
        )
    alive = [one for one in asked if one.is_alive]
    stores = sorted({one.store for one in alive or asked})
    if len(stores) > 1:
        where = "is at work for" if alive else "was submitted into"
        raise StoreError(
            f"{known}: run {runs[0]} {where} several stores: {', '.join(stores)}; choose one of them with --store"
        )
    return (alive or asked)[-1]


def cancel(address: str, run: str, *, url: str | None = None) -> Submission:
    """Stop the job of a run, and return how it ended; what it has stored stays, and a new submission goes on there."""
    job = latest(address, run, url=url)
    server = JobServer(address)
    end = time.monotonic() + CANCEL_TIMEOUT_S
    if job.is_alive:
        server.stop(job.id)
    while job.is_alive:
        if time.monotonic() > end:
            raise StoreError(f"{shown(address)}: {job.id} has not stopped within {CANCEL_TIMEOUT_S:.0f} s; try again")
        time.sleep(POLL_S)
        job = server.submission(job.id)
    return job
