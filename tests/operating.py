"""The commands as an operator calls them, and a run of theirs."""

from __future__ import annotations

import os
from pathlib import Path

from click.testing import CliRunner, Result

from pipeline.cli import cli
from pipeline.executor import InlineExecutor
from pipeline.run import run
from pipeline.store import open_store
from tests.durability.schedules import tiny_job


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments, env={"COLUMNS": "160"})


def refused(done: Result, *said: str) -> None:
    assert done.exit_code == 2, done.output
    assert [line.startswith("error: ") for line in done.stderr.splitlines()].count(True) == 1, done.output
    assert "Traceback" not in done.output
    for text in said:
        assert text in done.output
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        assert os.environ.get(name, "none") not in done.output


def committed(tmp_path: Path) -> Path:
    store = tmp_path / "store"
    run(tiny_job(tmp_path), open_store(str(store)), InlineExecutor())
    return store
