"""What all schedules share: the tiny job, and a store that does not wait between its attempts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import pipeline.store


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.store, "FIRST_PAUSE_S", 0.0)
    torch.set_num_threads(1)
