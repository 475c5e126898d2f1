"""The command line as a person and a script meet it: help, exit codes, messages, formats."""

from __future__ import annotations

import csv
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from rich.cells import cell_len

from pipeline.cli import cli
from pipeline.store import open_store
from tests.census import write_job
from tests.handmade import write_run
from tests.servers import wait_until

COMMANDS = ("run", "plan", "query", "tables", "show", "status", "verify", "gc", "catalogue", "submit", "logs", "cancel")
COMMANDS = (*COMMANDS, "up")
HEAVY = {"torch", "ray", "prefect", "duckdb", "pyarrow", "pydantic", "rich", "numpy", "fsspec"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("store"))
    write_run(open_store(url), "aaaa", ("mlp-0", "mlp-0-init"))
    return url


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


def test_query_prints_a_table(store: str) -> None:
    result = call("query", "SELECT site, count(*) AS units FROM neurons GROUP BY site ORDER BY site", store=store)
    assert result.stdout.splitlines() == [
        "site      units",
        "───────────────",
        "head          6",
        "layers.0      8",
    ]


def test_query_reads_stdin_and_says_if_there_are_more_rows(store: str) -> None:
    result = call("query", "-", "--rows", "3", store=store, text="SELECT unit FROM neurons")
    assert result.stdout.splitlines()[-1] == "the first 3 rows; --rows 0 prints all, --format csv writes all"
    assert len(result.stdout.splitlines()) == 6
    assert len(call("query", "SELECT unit FROM neurons", "--rows", "0", store=store).stdout.splitlines()) == 16
    assert call("query", "FROM neurons WHERE unit > 99", store=store).stdout.startswith("no rows (run, model, ")


def test_query_writes_csv(store: str) -> None:
    sql = (
        "SELECT unit, fire_rate, template_cos, weight FROM neurons "
        "JOIN patterns USING (run, model, data, split, site, unit) ORDER BY model, site, unit LIMIT 5"
    )
    rows = list(csv.DictReader(call("query", sql, "--format", "csv", store=store).stdout.splitlines()))
    # null, zero and NaN are three things
    assert rows[0]["fire_rate"] == ""
    assert (float(rows[4]["fire_rate"]), rows[4]["template_cos"]) == (0.0, "nan")
    assert json.loads(rows[0]["weight"])[0] == -1.0


def test_query_writes_json(store: str) -> None:
    sql = "SELECT site, unit, fire_rate, template_cos FROM neurons WHERE unit = 1 ORDER BY site, template_cos"
    rows = json.loads(call("query", sql, "--format", "json", store=store).stdout)
    assert rows[0] == {"site": "head", "unit": 1, "fire_rate": None, "template_cos": 0.25}
    assert rows[-1] == {"site": "layers.0", "unit": 1, "fire_rate": 0.0, "template_cos": "NaN"}
    assert json.loads(call("query", "FROM neurons WHERE unit > 9", "--format", "json", store=store).stdout) == []


def test_query_writes_a_file_whole_or_not_at_all(store: str, tmp_path: Path) -> None:
    target = tmp_path / "out.parquet"
    assert call("query", "FROM neurons", "-o", str(target), store=store).exit_code == 0
    table = pq.read_table(target)
    assert (table.num_rows, str(table.schema.field("unit").type)) == (14, "int32")
    refused(
        call("query", "SELECT site::INT FROM neurons", "-o", str(tmp_path / "bad.csv"), store=store),
        "Could not convert",
    )
    refused(
        call("query", "FROM neurons", "-o", str(tmp_path / "a" / "b.csv"), store=store), "cannot be written: No such"
    )
    refused(call("query", "FROM neurons", "-o", str(tmp_path / "a.txt"), store=store), "name the file .csv, .json or")
    assert os.listdir(tmp_path) == ["out.parquet"]


def test_query_refuses_mistakes(store: str) -> None:
    refused(call("query", "SELECT nme FROM models", store=store), 'Referenced column "nme" not found', "LINE 1:")
    refused(call("query", "DROP VIEW neurons", store=store), "tables of committed runs are never written")
    known = "collapse, detectors, families, idle, patterns, words"
    refused(call("query", store=store), f"expected either SQL or --question NAME; known: {known}")
    refused(call("query", "--question", "pattern", store=store), "did you mean 'patterns'?")
    refused(call("query", "FROM runs", "--run", "b", store=store), "no committed run begins with 'b'")


@pytest.mark.parametrize("columns", [80, 120])
def test_the_three_questions_fit_the_terminal(store: str, columns: int) -> None:
    for name in ("patterns", "idle", "detectors"):
        result = call("query", "--question", name, store=store, columns=columns)
        assert result.exit_code == 0
        assert max(map(len, result.stdout.splitlines())) <= columns
        assert "…" not in result.stdout
        assert "do not fit" not in result.stdout


def test_the_questions_are_answered(store: str) -> None:
    def answer(name: str) -> list[list[str]]:
        rows = call("query", "--question", name, "--format", "csv", store=store).stdout.splitlines()
        return list(csv.reader(rows))[1:]

    patterns = answer("patterns")
    # the dead unit's cosine is undefined: three of four units
    assert patterns[0] == ["mlp", "layers.0", "3", "0.25", "0.75", "0.5", "0.0625", "1.0", "digits/test"]
    assert [row[1] for row in patterns] == ["layers.0", "head"]
    assert answer("idle") == [["mlp-0", "layers.0", "digits", "4", "1", "1", "0.97", "2~3"]]
    detectors = answer("detectors")
    # it fires in 30 rows, 20 of them of the 30 rows of class 2
    assert [row[:5] for row in detectors] == [
        [str(c), "mlp-0", "layers.0", "0", str([0.0, 0.2, 0.5][c])] for c in range(3)
    ]


def test_a_question_about_what_was_not_measured_says_so(tmp_path: Path) -> None:
    url = str(tmp_path)
    write_run(open_store(url), "a", tables=("models", "sites"))
    result = call("query", "--question", "idle", store=url)
    assert result.exit_code == 0


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
    (tmp_path / "runs/aaaa/tables/sites/part-00000.parquet").unlink()
    harmed = call("verify", "aa", store=store.url)
    assert harmed.exit_code == 1
    (tmp_path / "runs" / "bbbb" / "_manifest.json").write_bytes(b"{")
    listed = call("status", store=store.url).stdout
    assert re.search(r"aaaa .*handmade", listed)
    assert re.search(r"bbbb .*spoilt: verify says how", listed)
    assert "wrong: runs/aaaa/tables/sites/part-00000.parquet is missing" in harmed.stdout


def test_a_job_is_refused_in_one_message_and_nothing_is_written(tmp_path: Path) -> None:
    job = tmp_path / "job.toml"
    url = str(tmp_path / "store")
    refused(call("run", str(job), store=url), f"error: {job}: there is no such job file")
    write_job(job)
    wrong = {
        'family = "mlp"': ('family = "mpl"', "did you mean 'mlp'?"),
        "batch_rows = 128": ("batch_row = 128", "did you mean 'batch_rows'?"),
        "steps = 30": ('steps = "30"', 'steps = "30": expected an integer'),
        "widths = [12]": ("widths = [12, 0]", "widths[1] = 0: expected greater than 0"),
        'source = "digits"': (
            'url = "nowhere"\ncolumns = { features = "x", label = "y", split = "z", shape = [1] }\nclasses = 2',
            "nowhere: there is no such",
        ),
    }
    for right, (mistake, said) in wrong.items():
        write_job(job)
        job.write_text(job.read_text().replace(right, mistake))
        refused(call("run", str(job), "--ray", "none", store=url), "error: ", said)
    # before Ray or Prefect is started
    for options in (["run", str(job), "--ray", "local"], ["run", str(job), "--prefect"], ["plan", str(job)]):
        refused(call(*options, store=url), "error: ", said)
    write_job(job)
    unwritable = tmp_path / "file"
    unwritable.write_text("")
    refused(call("run", str(job), "--ray", "none", store=str(unwritable / "store")), "cannot write")
    refused(call("run", str(job), "--ray", "none", store="/proc/store"), "/proc/store: no directory can be made there")
    assert not Path(url).exists()


def test_a_ray_address_that_does_not_answer_leaves_nothing_behind(tmp_path: Path) -> None:
    job, url = write_job(tmp_path / "job.toml"), str(tmp_path / "store")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        said = f"error: Ray at '{address}' does not answer: [Errno 111] Connection refused. Start it, or use --ray"
        for more in ([], ["--prefect"]):
            refused(call("run", str(job), "--ray", address, *more, store=url), said)
    refused(call("run", str(job), "--ray", "head:port", store=url), "error: Ray at 'head:port' does not answer: ")
    refused(call("run", str(job), "--ray", "http://head:8265", store=url), "HOST:6379", "neuron-census submit")
    assert not Path(url).exists()


@pytest.fixture(scope="module")
def census(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, str, Path]:
    """A real run by the command line."""
    directory = tmp_path_factory.mktemp("census")
    job = write_job(directory / "job.toml", more="[statistics.labels]\n[statistics.exemplars]")
    url = str(directory / "store")
    return call("run", str(job), "--ray", "none", store=url), url, job


def test_run_says_what_it_does_and_what_it_found(census: tuple[Result, str, Path]) -> None:
    result, url, job = census
    assert result.exit_code == 0, result.output
    assert re.search(r"^train: 1 of 1 in ", result.stderr, re.M)
    assert re.search(r"^run [0-9a-f]{16}: 1 models trained, \d+ cells measured, 0 reused$", result.stdout, re.M)
    for title in ("How much did training raise", "Which units are dead", "Which unit best detects which class?"):
        assert title in result.stdout
    again = call("run", str(job), "--ray", "none", store=url)
    assert (again.exit_code, "was committed before" in again.stdout) == (0, True)
    assert "committed" in call("plan", str(job), store=url).stdout


def test_the_other_commands_on_a_real_run(census: tuple[Result, str, Path]) -> None:
    _, url, _ = census
    assert call("verify", "--deep", store=url).exit_code == 0
    sites = json.loads(call("query", "SELECT site, input_kind FROM sites", "--format", "json", store=url).stdout)
    result = call("show", f"mlp-0/{sites[0]['site']}/3", store=url)
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 80
    for part in ("untrained", "cos(Cov(a,x), w)", "exemplars", "greatest"):
        assert part in result.stdout


DIVERGES = """
[[models]]
family = "mlp"
name = "wild"
data = "digits"
hyperparameters = { widths = [4] }
training = { steps = 100, learning_rate = 1e30 }
"""


def test_a_run_in_which_a_model_fails_commits_the_others_and_exits_1(tmp_path: Path) -> None:
    url = str(tmp_path / "store")
    result = call("run", str(write_job(tmp_path / "job.toml", more=DIVERGES)), "--ray", "none", store=url)
    assert result.exit_code == 1, result.output
    assert "failed: wild-0: " in result.stdout
    assert "Traceback" not in result.output
    names = call("query", "SELECT name, status FROM models ORDER BY name", "--format", "csv", store=url).stdout
    assert "mlp-0,ok\n" in names
    assert "wild-0,failed\n" in names
    refused(call("show", "wild-0", store=url), "model wild-0 was not measured, it failed: ")


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


@pytest.mark.parametrize("after_s", [0.5, 1.0, 4.0])
def test_an_interruption_is_clean(store: str, after_s: float) -> None:
    sql = "SELECT sum(a.range * b.range) FROM range(1000000) a, range(1000000) b"
    process = subprocess.Popen(command("query", sql, "--store", store), stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: cpu_seconds(process.pid) >= after_s, timeout_s=120)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    # Python ends by the signal if it came inside exec(), of which imports make much use; a shell says 130 of both
    assert process.returncode in (130, -signal.SIGINT)
    assert said.splitlines()[-1] == "interrupted"
