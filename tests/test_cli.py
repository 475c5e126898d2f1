"""The command line as a person and a script meet it: help, exit codes, messages, pipes, interruptions."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.cells import cell_len

from pipeline.store import open_store
from tests.command_line import call, command, refused
from tests.handmade import write_run
from tests.servers import wait_until

COMMANDS = (
    "run",
    "plan",
    "keys",
    "query",
    "tables",
    "show",
    "status",
    "verify",
    "gc",
    "catalogue",
    "submit",
    "logs",
    "cancel",
)
COMMANDS = (*COMMANDS, "up")
HEAVY = {"torch", "ray", "prefect", "duckdb", "pyarrow", "pydantic", "rich", "numpy", "fsspec"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("store"))
    write_run(open_store(url), "aaaa", ("mlp-0", "mlp-0-init"))
    return url


@pytest.mark.parametrize("arguments", [(), *[(name,) for name in COMMANDS]])
def test_help_imports_nothing_heavy(arguments: Sequence[str]) -> None:
    program = (
        "import sys; from pipeline.cli import cli\n"
        f"try: cli([*{list(arguments)}, '--help'], prog_name='neuron-census')\n"
        "except SystemExit as end: assert end.code == 0\n"
        f"print('heavy:', sorted({HEAVY} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "heavy: []" in shown
    assert "neuron-census" in shown
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize("name", COMMANDS)
def test_help_takes_less_than_a_third_of_a_second(name: str) -> None:
    def seconds() -> float:
        """Of the CPU: other processes share these cores."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command(name, "--help"), capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(2)) < 0.3


def test_help_names_every_command_in_the_order_of_use() -> None:
    shown = call("--help").stdout
    assert re.findall(r"^  (\w+)  ", shown.split("Commands:")[1], re.M) == list(COMMANDS)


def test_mistyped_commands_and_options_are_corrected() -> None:
    refused(call("qury"), "No such command 'qury'", "Did you mean 'query'?")
    refused(call("query", "--quesion", "idle"), "No such option '--quesion'", "--question")
    refused(call("query", "FROM runs", "--format", "cvs"), "'cvs' is not one of 'table', 'csv', 'json', 'parquet'")


def test_a_store_without_runs(tmp_path: Path) -> None:
    missing = str(tmp_path / "nothing")
    for arguments in (("query", "FROM runs"), ("show", "mlp-0"), ("verify",), ("status",)):
        refused(call(*arguments, store=missing), f"error: {missing}: holds no", "neuron-census run JOB.toml")
    assert not Path(missing).exists()
    refused(call("query", "FROM runs", "--store", "ftp://x"), "unknown scheme 'ftp'")


def test_the_store_option_goes_before_the_environment(store: str, tmp_path: Path) -> None:
    assert call("query", "FROM runs", "--store", store, store=str(tmp_path)).exit_code == 0


def test_tables_explains_columns(store: str) -> None:
    overview = call("tables").stdout
    assert "neurons" in overview
    page = call("tables", "neurons", columns=80).stdout
    assert "fire_rate" in page
    assert "null where" in page
    for text in (overview, page):
        assert max(map(cell_len, text.splitlines())) <= 80
        assert "…" not in text.replace("dense, conv2d, …", "").replace("features, …", "").replace("cosine, …", "")
    entries = json.loads(call("tables", "sites", "--format", "json").stdout)
    assert entries[0]["column"] == "run"
    assert {"table", "column", "type", "meaning", "unit", "range", "null", "formula"} <= set(entries[0])
    refused(call("tables", "neuron"), "no table 'neuron': did you mean 'neurons'?")


def test_show(store: str) -> None:
    for arguments in (("mlp-0/layers.0/2",), ("mlp-0", "layers.0", "2"), ("mlp-0/layers.0", "2")):
        result = call("show", *arguments, store=store)
        assert result.exit_code == 0
        assert result.stdout.startswith("mlp-0 / layers.0 / 2")
        assert "\x1b" not in result.stdout
    refused(call("show", "mlp-0/layer.0/2", store=store), "did you mean 'layers.0'?")
    refused(call("show", store=store), "Missing argument")


def test_verify_and_status(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    write_run(store, "aaaa")
    (tmp_path / "runs" / "bbbb" / "reduced").mkdir(parents=True)
    (tmp_path / "runs" / "bbbb" / "reduced" / "x").write_bytes(b"")
    sound = call("verify", "--deep", store=store.url)
    assert (sound.exit_code, "sound" in sound.stdout) == (0, True)
    listed = call("status", store=store.url).stdout
    assert "aaaa" in listed
    assert re.search(r"bbbb .*not yet: run its job again", listed)
    refused(call("status", "zz", store=store.url), "holds no run whose id begins with 'zz'; known: aaaa, bbbb")
    refused(call("status", "aab", store=store.url), "begins with 'aab'; did you mean 'aaaa'? known: aaaa, bbbb")
    (tmp_path / "runs/aaaa/tables/sites/part-00000.parquet").unlink()
    harmed = call("verify", "aa", store=store.url)
    assert harmed.exit_code == 1
    (tmp_path / "runs" / "bbbb" / "_manifest.json").write_bytes(b"{")
    listed = call("status", store=store.url).stdout
    assert re.search(r"aaaa .*handmade", listed)
    assert re.search(r"bbbb .*spoilt: verify says how", listed)
    assert "wrong: runs/aaaa/tables/sites/part-00000.parquet is missing" in harmed.stdout


def test_a_closed_pipe_is_no_error(store: str) -> None:
    program = (
        f"{' '.join(command('query', 'FROM neurons,range(20000)', '--format', 'csv', '--store', store))} | head -1"
    )
    program = program.replace("FROM neurons,range(20000)", "'FROM neurons,range(20000)'")
    shown = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=False)
    assert shown.stdout.startswith("run,model,")
    assert "Traceback" not in shown.stderr


def cpu_seconds(pid: int) -> float:
    """What a process has used so far, by the kernel's own record."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize(
    ("after_s", "number", "code"),
    [(0.5, signal.SIGINT, 130), (1.0, signal.SIGINT, 130), (4.0, signal.SIGINT, 130), (4.0, signal.SIGTERM, 143)],
)
def test_an_interruption_is_clean(store: str, after_s: float, number: int, code: int) -> None:
    sql = "SELECT sum(a.range * b.range) FROM range(1000000) a, range(1000000) b"
    process = subprocess.Popen(command("query", sql, "--store", store), stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: cpu_seconds(process.pid) >= after_s, timeout_s=120)
        process.send_signal(number)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    # Python ends by the signal if it came inside exec(), of which imports make much use; a shell says 130 of both
    assert process.returncode in (code, -signal.SIGINT)
    assert said.splitlines()[-1] == "interrupted"
