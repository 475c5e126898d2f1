"""The command line, called in this process or as a program."""

from __future__ import annotations

import sys

from click.testing import CliRunner, Result

from pipeline.cli import cli


def call(*arguments: str, store: str | None = None, text: str | None = None, columns: int = 80) -> Result:
    environment = {"COLUMNS": str(columns), "NEURON_CENSUS_STORE": store, "NO_COLOR": "1"}
    return CliRunner().invoke(cli, arguments, env=environment, input=text, prog_name="neuron-census")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pipeline.cli", *arguments]


def refused(result: Result, *said: str) -> None:
    """Exit code 2, one message on stderr and nothing on stdout."""
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert "Traceback" not in result.stderr
    for text in said:
        assert text in result.stderr
