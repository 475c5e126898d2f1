"""The census as a Prefect flow: what a schedule runs, with its progress and its answers as artifacts.

Layer 6. The flow is the whole run, and no shard of it a Prefect task: Ray schedules those. Nothing but short strings
and numbers passes through Prefect. Without an API address in the environment Prefect starts a temporary server by
itself. Prefect only watches: a server that does not answer, or stops answering, keeps nothing from being measured.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from typing import Any

# set before the import reads them: no telemetry, room for a slow machine to start the temporary server, no traceback
# where the command line says what is wrong, and seconds instead of minutes to give up a server that is gone
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
os.environ.setdefault("PREFECT_CLIENT_MAX_RETRIES", "1")

import httpx
from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.settings import PREFECT_API_URL

from pipeline.address import shown
from pipeline.cluster.executor import executor_at
from pipeline.errors import CensusError
from pipeline.job import load_job
from pipeline.progress import Progress, Silent
from pipeline.resolve import Resolved, resolve
from pipeline.run import Outcome, carry_out
from pipeline.store import open_store

# an update costs 15 to 27 ms
ARTIFACT_INTERVAL_S = 1.0
HEALTH_TIMEOUT_S = 5.0
# what the client raises when the server is gone
UNANSWERED = (httpx.HTTPError, OSError, RuntimeError)
NOT_LET_IN = (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN)
REFUSED = "refuses the credentials, or that there are none (PREFECT_API_AUTH_STRING, or PREFECT_API_KEY)"


class ArtifactProgress:
    """Progress artifacts of the flow run, at most one update a second, beside another progress on the terminal."""

    def __init__(self, beside: Progress) -> None:
        self._beside = beside
        self._artifact: Any = None
        self._total = self._done = 0
        self._shown_s = 0.0
        self._is_heard = True

    def stage(self, name: str, total: int, done: int) -> None:
        """Open an artifact for the stage."""
        self._beside.stage(name, total, done)
        self._finish()
        self._total, self._done = total, done
        self._artifact = self.tell(
            lambda: create_progress_artifact(self._percent, key=f"census-{name}", description=f"{total} {name}")
        )

    def advance(self, count: int) -> None:
        """Move the stage's artifact, if the last update is long enough ago."""
        self._beside.advance(count)
        self._done += count
        if time.monotonic() - self._shown_s >= ARTIFACT_INTERVAL_S:
            self._shown_s = time.monotonic()
            self._update()

    def note(self, text: str) -> None:
        """Pass it on."""
        self._beside.note(text)

    def finish(self, summary: str) -> None:
        """Bring the last artifact to where its stage ended, and leave a summary."""
        self._finish()
        self.tell(lambda: create_markdown_artifact(summary, key="census-summary"))

    def tell(self, update: Callable[[], Any]) -> Any:
        """Tell the server something, as long as it listens."""
        if not self._is_heard:
            return None
        try:
            return update()
        except UNANSWERED as error:
            self._is_heard = False
            why = REFUSED if is_refused(error) else f"does not answer any more ({type(error).__name__})"
            self.note(f"Prefect {why}: the run goes on without it")
            return None

    def _finish(self) -> None:
        self._update()
        self._artifact = None

    def _update(self) -> None:
        if self._artifact is not None:
            self.tell(lambda: update_progress_artifact(self._artifact, self._percent))

    @property
    def _percent(self) -> float:
        return 100.0 * self._done / self._total if self._total else 100.0


@dataclass(frozen=True)
class Caller:
    """Whoever runs the flow in this process: what is resolved already, where progress is shown, and what came of it."""

    resolved: Resolved | None = None
    progress: Progress = field(default_factory=Silent)
    outcomes: list[Outcome] = field(default_factory=list)


_CALLER: ContextVar[Caller] = ContextVar("_CALLER")


@flow(name="census", persist_result=False)
def census(job: str, store: str, ray: str = "local") -> dict[str, Any]:
    """Run the job file `job` into `store` on Ray (`local` or a cluster's address) or without it (`none`).

    Returns the outcome as plain values. The artifacts are the stages' progress and a summary.
    """
    caller = _CALLER.get(None) or Caller()
    progress = ArtifactProgress(caller.progress)
    outcome = _census(job, store, ray, progress, caller.resolved)
    caller.outcomes.append(outcome)
    progress.finish(_summary(outcome))
    return asdict(outcome)


def take_census(job: str, *, store: str, ray: str, progress: Progress, resolved: Resolved | None = None) -> Outcome:
    """Run the flow in this process; if Prefect's server does not answer, say so once and do without it.

    `resolved` is what the job comes to, where that is known.
    """
    api = PREFECT_API_URL.value()
    if api and not answers(api):
        progress.note(f"Prefect at {shown(api)} does not answer: the run goes on without it")
        return _census(job, store, ray, progress, resolved)
    caller = Caller(resolved, progress)
    token = _CALLER.set(caller)
    try:
        census(job=job, store=store, ray=ray)
    except CensusError:
        raise
    except UNANSWERED as error:
        # the server went away: what it could not be told is done all the same
        if not caller.outcomes:
            # before the run began, or it failed by itself and will again: what is done is not done twice
            why = REFUSED if is_refused(error) else "does not answer any more"
            progress.note(f"Prefect {why}: the run goes on without it")
            return _census(job, store, ray, progress, resolved)
    finally:
        _CALLER.reset(token)
    return caller.outcomes[0]


def is_refused(error: BaseException | None) -> bool:
    """Whether an error, or what it came of, is a server that does not take the credentials it was given, or none."""
    while error is not None:
        if isinstance(error, httpx.HTTPStatusError) and error.response.status_code in NOT_LET_IN:
            return True
        error = error.__cause__ or error.__context__
    return False


def answers(api: str) -> bool:
    """Whether a Prefect server answers at an API address, if only to whom it knows: this asks without credentials."""
    try:
        answer = httpx.get(f"{api.rstrip('/')}/health", timeout=HEALTH_TIMEOUT_S)
    except httpx.HTTPError:
        return False
    return answer.is_success or answer.status_code in NOT_LET_IN


def _census(job: str, store: str, ray: str, progress: Progress, resolved: Resolved | None) -> Outcome:
    asked, opened = load_job(job), open_store(store)
    with executor_at(ray, asked.allotted, progress.note) as executor:
        return carry_out(resolved or resolve(asked, opened), opened, executor, progress)


def _summary(outcome: Outcome) -> str:
    failed = "".join(f"\n- failed: {name}: {reason}" for name, reason in outcome.failed.items())
    return f"Run `{outcome.run}`: {outcome.done}.{failed}"
