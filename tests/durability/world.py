"""A store in memory that keeps objects as S3 does, and doors to it through which everything goes wrong that can.

A fault is a function of (seed, driver, operation, key, how often it was asked for that key), never of the order in
which threads come by: the same seed is the same schedule of faults.
"""

from __future__ import annotations

import errno
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from random import Random

from aiohttp import ClientPayloadError
from botocore.exceptions import ClientError, ConnectionClosedError, ReadTimeoutError

from pipeline.store import Store, Stored


class Crash(BaseException):
    """The process ends here: no `except Exception` sees it."""


@dataclass
class World:
    """What is stored, and everything that happened, in order."""

    objects: dict[str, bytes] = field(default_factory=dict)
    commits: Counter[str] = field(default_factory=Counter)
    late: list[tuple[str, bytes]] = field(default_factory=list)
    history: list[str] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def create(self, key: str, content: bytes) -> bool:
        with self.lock:
            if key in self.objects:
                return False
            self.objects[key] = content
            self.commits[key] += 1
            return True

    def deliver(self) -> None:
        """Writes that were on their way for long arrive now, their writer perhaps long dead."""
        with self.lock:
            for key, content in self.late:
                self.history.append(f"arrives late: {key}: {'stored' if self.create(key, content) else 'taken'}")
            self.late.clear()


def http(status: int, code: str) -> OSError:
    """An answer of the server as s3fs raises it."""
    error = OSError(errno.EINVAL, "said the server")
    error.__cause__ = ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "Any")
    return error


def unanswered(cause: Exception) -> OSError:
    error = OSError("no answer")
    error.__cause__ = cause
    return error


ERRORS: dict[str, Callable[[], Exception]] = {
    "500": lambda: http(500, "InternalError"),
    "503": lambda: http(503, "SlowDown"),
    "409": lambda: http(409, "ConditionalRequestConflict"),
    "400": lambda: http(400, "IncompleteBody"),
    "dropped": lambda: unanswered(ConnectionClosedError(endpoint_url="s3")),
    "timeout": lambda: unanswered(ReadTimeoutError(endpoint_url="s3")),
    "cut off": lambda: ClientPayloadError("not enough data to satisfy content length header"),
    "disk full": lambda: OSError(errno.ENOSPC, "No space left on device"),
    "denied": lambda: http(403, "AccessDenied"),
}
# what can happen to a write, and how often beside each other
WRITES = {"500": 3, "503": 3, "409": 1, "400": 1, "dropped": 3, "unacknowledged": 4, "late": 4, "crash before": 2}
WRITES |= {"crash after": 2, "disk full": 1, "denied": 1, "rival": 4}
READS = {"500": 3, "503": 3, "dropped": 2, "timeout": 2, "cut off": 3, "crash before": 1}


@dataclass(frozen=True)
class Weather:
    """How likely a fault is at each operation of one driver."""

    seed: int
    driver: str
    likelihood: float

    def fault(self, operation: str, key: str, count: int, kinds: dict[str, int]) -> str | None:
        random = Random(f"{self.seed}/{self.driver}/{operation}/{key}/{count}")
        if random.random() >= self.likelihood:
            return None
        return random.choices(list(kinds), list(kinds.values()))[0]


class FaultyStore(Store):
    """One driver's door to the world; `rival` is what another driver does in the middle of a write of this one."""

    def __init__(self, world: World, weather: Weather, rival: Callable[[], None] = lambda: None) -> None:
        super().__init__("memory://world")
        self.world = world
        self.weather = weather
        self.rival = rival
        self._asked: Counter[tuple[str, str]] = Counter()

    def _create(self, key: str, content: bytes) -> bool:
        fault = self._fault("write", key, WRITES)
        if fault == "rival":
            self.rival()
        elif fault == "late":
            self.world.late.append((key, content))
            raise ERRORS["timeout"]()
        elif fault == "crash before":
            raise Crash
        elif fault not in (None, "crash after", "unacknowledged"):
            raise ERRORS[fault]()
        created = self.world.create(key, content)
        if fault == "crash after":
            raise Crash
        if fault == "unacknowledged":
            raise ERRORS["dropped"]()
        return created

    def _read(self, key: str) -> bytes:
        self._fail("read", key)
        try:
            return self.world.objects[key]
        except KeyError:
            raise FileNotFoundError(key) from None

    def _list(self, prefix: str) -> dict[str, Stored]:
        self._fail("list", prefix)
        now = datetime.now(UTC)
        with self.world.lock:
            return {key: Stored(now, len(one)) for key, one in self.world.objects.items() if key.startswith(prefix)}

    def _delete(self, key: str) -> None:
        self._fail("delete", key)
        self.world.objects.pop(key, None)

    def _fail(self, operation: str, key: str) -> None:
        fault = self._fault(operation, key, READS)
        if fault == "crash before":
            raise Crash
        if fault is not None:
            raise ERRORS[fault]()

    def _fault(self, operation: str, key: str, kinds: dict[str, int]) -> str | None:
        if key.startswith("probe-"):
            # its name is drawn anew every time: no schedule could repeat it
            return None
        if "/log/" in key:
            # and so is the end of a log's
            key = f"{key.partition('/log/')[0]}/log/{Path(key).suffix}"
        self._asked[operation, key] += 1
        count = self._asked[operation, key]
        fault = self.weather.fault(operation, key, count, kinds)
        if fault:
            self.world.history.append(f"{self.weather.driver}: {fault}: {operation} {count} of {key}")
        if self.world.late and Random(f"{self.weather}/{operation}/{key}/{count}").random() < 0.2:
            self.world.deliver()
        return fault
