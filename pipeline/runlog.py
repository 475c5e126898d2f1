"""What a run's tasks took, where and by which kernel, and what the statistics cost: one log object per driver.

Layer 4. Nothing in it decides anything, and nothing is made from it: it differs between two drivers of one run, so it
is in no manifest. A driver that was killed leaves only that it had begun.
"""

from __future__ import annotations

import json
import os
import socket
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import torch

from pipeline.claims import log_prefix
from pipeline.errors import StoreError
from pipeline.kernels import choose
from pipeline.resolve import Resolved
from pipeline.stage import Stage
from pipeline.store import Store
from pipeline.task import Receipt

# why a model is neither done nor failed by itself, see `Stage`
OPEN = ("unread", "spoilt", "lost")


@dataclass(frozen=True)
class LeftOpen:
    """What the last driver of a run left open: models by name, and why (one of `OPEN`), in words as `reason`."""

    why: str
    reason: str
    models: tuple[str, ...]


def left_open(store: Store, run: str) -> tuple[LeftOpen, ...]:
    """What the last driver of a run said it could not do; nothing where it was killed, or is at work still."""
    last = max(store.keys(log_prefix(run)), default="")
    try:
        said = json.loads(store.get(last))["open"] if last.endswith(".json") else []
        return tuple(LeftOpen(one["why"], one["reason"], tuple(one["models"])) for one in said)
    except (StoreError, ValueError, TypeError, KeyError):
        # nothing is decided by it, and logs of before do not say
        return ()


@dataclass
class RunLog:
    """The log of one driver, from its first stage to its last."""

    resolved: Resolved
    workers: int
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    receipts: list[Receipt] = field(default_factory=list)
    _mark: str = field(default_factory=lambda: uuid.uuid4().hex[:8])

    @property
    def _name(self) -> str:
        return f"{log_prefix(self.resolved.run)}{self.started:%Y%m%dT%H%M%SZ}-{self._mark}"

    def begin(self, store: Store) -> None:
        """Say that a driver is at work: what earlier ones have left is no garbage from now on."""
        store.put_once(f"{self._name}.begun", json.dumps({"run": self.resolved.run, "driver": _driver()}).encode())

    def add(self, stage: Stage) -> None:
        """Take down what the tasks of a stage took."""
        self.receipts += stage.receipts

    def write(self, store: Store) -> str | None:
        """Store the log; return its key, or None where nothing was done."""
        if not self.receipts:
            return None
        key = f"{self._name}.json"
        store.put_once(key, json.dumps(self.content(), indent=1, sort_keys=True).encode())
        return key

    def _remarks(self) -> list[str]:
        """What a person should know of how it was done, each once."""
        own = choose.remark(self.resolved.kernel, self.resolved.device)
        found = [remark for receipt in self.receipts for remark in receipt.remarks]
        return list(dict.fromkeys([*([own] if own else []), *found]))

    def _open(self, names: dict[str, str]) -> list[dict[str, Any]]:
        """What keeps the run open: of each model the first reason, as `Stage.open` has it."""
        found: dict[tuple[str, str], set[str]] = {}
        known: set[str] = set()
        for receipt in self.receipts:
            for why in OPEN:
                for model, reason in getattr(receipt, why).items():
                    if model not in known:
                        found.setdefault((why, reason), set()).add(names.get(model, model))
                    known.add(model)
        return [
            {"why": why, "reason": reason, "models": sorted(models)} for (why, reason), models in sorted(found.items())
        ]

    def content(self) -> dict[str, Any]:
        """The log as JSON values: seconds are of the clock, each task's on its own worker."""
        names = {model.id: model.name for model in self.resolved.models}
        costs = [
            {
                "data": one.data,
                "model": names[one.model],
                "rows": one.cost.rows,
                "forward_s": one.cost.forward,
                "measured_s": one.cost.measured,
                "statistics_over_forward": one.cost.ratio,
                "passes": one.cost.passes,
            }
            for receipt in self.receipts
            for one in receipt.costs
        ]
        return {
            "run": self.resolved.run,
            "job": self.resolved.job.name,
            "started": self.started.isoformat(),
            "finished": datetime.now(UTC).isoformat(),
            "driver": _driver(),
            "workers": self.workers,
            "kernel": self.resolved.kernel,
            "open": self._open(names),
            "remarks": self._remarks(),
            "device": self.resolved.device,
            "seconds": _seconds(self.receipts),
            "statistics": costs,
            "tasks": [_task(receipt) for receipt in self.receipts],
        }


def _driver() -> dict[str, Any]:
    return {"host": socket.gethostname(), "process": os.getpid(), "torch": torch.__version__}


def _seconds(receipts: list[Receipt]) -> dict[str, dict[str, float]]:
    """Seconds of all tasks of a kind together, and what they went to."""
    total: dict[str, dict[str, float]] = {}
    for receipt in receipts:
        of_kind = total.setdefault(receipt.kind, {"all": 0.0})
        for name, spent in {"all": receipt.seconds, **receipt.spent}.items():
            of_kind[name] = of_kind.get(name, 0.0) + spent
    return total


def _task(receipt: Receipt) -> dict[str, Any]:
    named = {"kind": receipt.kind, "units": receipt.units, "host": receipt.host, "device": receipt.device}
    reasons = {name: value for name in ("failed", "unread", "spoilt", "lost") if (value := getattr(receipt, name))}
    spent = {"seconds": receipt.seconds, "spent": receipt.spent, "remarks": list(receipt.remarks)}
    return {**named, **spent, **reasons}
