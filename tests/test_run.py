"""A run from end to end: reuse of what exists, the same bytes however it runs, resumption after a kill."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from sklearn.datasets import load_digits

from pipeline import pack
from pipeline.base_columns import BASE
from pipeline.columns import Column
from pipeline.errors import JobError, StoreError
from pipeline.executor import InlineExecutor
from pipeline.pack import PackTask
from pipeline.query import ask, connect
from pipeline.reduce import ReduceTask
from pipeline.resolve import Resolved
from pipeline.run import run
from pipeline.store import Store, open_store
from pipeline.verify import verify_runs
from tests.census import CNN, digits_file, parquet_job, published, run_inline, small_job, write_job
from tests.durability.schedules import tiny_job


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, dict[str, bytes]]:
    directory = tmp_path_factory.mktemp("undisturbed")
    outcome, store = run_inline(small_job(directory), str(directory / "store"))
    return str(directory / "store"), outcome.run, published(store, outcome.run)


def test_a_finished_run_is_found_finished(undisturbed, tmp_path: Path) -> None:
    url, run_id, _ = undisturbed
    outcome, _ = run_inline(small_job(tmp_path), url)
    assert (outcome.run, outcome.new, outcome.cells) == (run_id, False, 0)


class Killed(InlineExecutor):
    """Ends the process after so many tasks of a kind."""

    def __init__(self, kind: type, after: int) -> None:
        self._kind = kind
        self._left = after

    def map(self, function, tasks):
        for one in super().map(function, tasks):
            yield one
            self._left -= isinstance(tasks[0], self._kind)
            if not self._left:
                raise KeyboardInterrupt


def left_by(kind: type, after: int, directory: Path) -> Store:
    """What a driver leaves that was killed after so many tasks of a kind."""
    store = open_store(str(directory / "store"))
    with pytest.raises(KeyboardInterrupt):
        run(tiny_job(directory), store, Killed(kind, after))
    return store


def manifests(store: Store) -> list[str]:
    return [key for key in store.keys("runs/") if key.endswith("_manifest.json")]


def test_parts_that_another_version_cut_otherwise_are_not_committed(tmp_path: Path, monkeypatch) -> None:
    store = left_by(PackTask, 3, tmp_path)
    monkeypatch.setattr(pack, "PART_BYTES", 1)
    with pytest.raises(StoreError, match=r"part-00000\.parquet holds other rows than belong there"):
        run(tiny_job(tmp_path), store, InlineExecutor())
    assert not manifests(store)


def test_a_part_by_another_writer_is_committed_as_it_is(tmp_path: Path) -> None:
    store = left_by(PackTask, 3, tmp_path)
    key = next(key for key in store.keys("runs/") if "/tables/" in key)
    pq.write_table(pq.read_table(io.BytesIO(store.get(key))), Path(store.url, key), compression="none")
    outcome = run(tiny_job(tmp_path), store, InlineExecutor())
    assert outcome.new
    assert [report.problems for report in verify_runs(store, deep=True)] == [()]


def more_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a later version of this program has them."""
    column = Column("more", "int64", "what a later version says of a model", table="models")
    monkeypatch.setitem(BASE, "models", (*BASE["models"], column))


def test_a_version_with_other_columns_goes_on_from_the_cells_alone(tmp_path: Path, monkeypatch) -> None:
    store = left_by(ReduceTask, 1, tmp_path)
    (left,) = store.folders("runs/")
    more_columns(monkeypatch)
    outcome = run(tiny_job(tmp_path), store, InlineExecutor())
    assert (outcome.new, outcome.trained, outcome.cells, outcome.reused_cells) == (True, 0, 0, 6)
    assert outcome.run != left
    assert set(_table(store, outcome.run, "models").run) == {outcome.run}
    assert len(_table(store, outcome.run, "models").more) == 2
    assert [report.problems for report in verify_runs(store, deep=True)] == [()]


def test_rows_with_other_columns_are_never_mixed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Resolved, "tables_key", "of a version that says nothing of it")
    store = left_by(ReduceTask, 1, tmp_path)
    more_columns(monkeypatch)
    with pytest.raises(StoreError, match=r"models\.arrow\.zst has other columns than that of .*: remove what is below"):
        run(tiny_job(tmp_path), store, InlineExecutor())
    assert not manifests(store)


def test_adding_a_model_computes_only_its_cells(undisturbed, tmp_path: Path) -> None:
    job = small_job(tmp_path, seeds="0, 1", more=CNN)
    outcome, store = run_inline(small_job(tmp_path), str(tmp_path / "store"))
    grown = run(small_job(tmp_path, seeds="0, 1", more=CNN), store, InlineExecutor())
    assert grown.reused_cells == outcome.cells
    assert (grown.trained, grown.cells) == (2, 2 * outcome.cells)
    fresh, other = run_inline(job, str(tmp_path / "fresh"))
    assert fresh.cells == 3 * outcome.cells
    assert published(store, grown.run) == published(other, fresh.run)


def test_adding_a_statistic_computes_only_its_cells(tmp_path: Path) -> None:
    outcome, store = run_inline(small_job(tmp_path), str(tmp_path / "store"))
    job = small_job(tmp_path, more="[statistics.labels]")
    grown = run(job, store, InlineExecutor())
    assert (grown.trained, grown.reused_cells, grown.cells) == (0, outcome.cells, outcome.cells // 3)
    fresh, other = run_inline(job, str(tmp_path / "fresh"))
    assert published(store, grown.run) == published(other, fresh.run)


def test_chosen_sites_and_rows_are_cells_of_their_own(tmp_path: Path) -> None:
    outcome, store = run_inline(small_job(tmp_path), str(tmp_path / "store"))
    choice = '[sites]\nexclude = ["gate:identity"]\nrows = { "kind:dense" = 0.5 }'
    chosen = run(small_job(tmp_path, more=choice), store, InlineExecutor())
    assert (chosen.trained, chosen.reused_cells, chosen.cells) == (0, 0, outcome.cells)
    sites = _table(store, chosen.run, "sites")
    assert set(sites.gate) == {"relu"}
    assert set(sites.row_fraction) == {0.5}
    few, every = (
        _table(store, one.run, "neurons").set_index(["model", "split", "site", "unit"]) for one in (chosen, outcome)
    )
    share = few["n"] / every["n"].reindex(few.index)
    assert share.groupby("split").nunique().eq(1).all()
    assert share.between(0.4, 0.6).all()


def test_a_model_of_which_no_site_is_chosen_fails_and_hides_nothing(tmp_path: Path) -> None:
    outcome, store = run_inline(small_job(tmp_path), str(tmp_path / "store"))
    chosen = run(small_job(tmp_path, more=CNN + '[sites]\ninclude = ["kind:conv2d"]'), store, InlineExecutor())
    reason = "no site of the model is chosen by include=['kind:conv2d'], exclude=[]"
    assert dict(chosen.failed) == dict.fromkeys(("mlp-0", "mlp-0-init"), reason)
    assert set(_table(store, chosen.run, "sites").kind) == {"conv2d"}
    latest = "SELECT DISTINCT run FROM neurons JOIN models USING (run, model) WHERE name = 'mlp-0'"
    with closing(connect(store)) as con:
        assert list(ask(con, latest).rows) == [(outcome.run,)]


@pytest.mark.parametrize("choice", ['include = ["kind:conv2d", "kind:lstm"]', 'exclude = ["*"]'])
def test_sites_that_no_model_has_are_refused_before_anything_is_trained(choice: str, tmp_path: Path) -> None:
    job, store = small_job(tmp_path, more=f"[sites]\n{choice}"), open_store(str(tmp_path / "store"))
    expected = "patterns that leave a site of some model; mlp-0 has hidden0 (dense, relu), classifier (dense, identity)"
    with pytest.raises(JobError) as caught:
        run(job, store, InlineExecutor())
    line = 1 + (tmp_path / "job.toml").read_text().splitlines().index(choice)
    assert str(caught.value) == f"{job.place}:{line}: [sites] {choice}: expected {expected}"
    assert not [key for key in store.keys("") if key.startswith(("models/", "states/"))]


def test_adding_a_data_file_computes_only_its_chunks(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    digits_file(data / "a.parquet", rows=range(300), split="train")
    digits_file(data / "c.parquet", rows=range(300, 420), split="test")
    job = parquet_job(tmp_path)
    outcome, store = run_inline(job, str(tmp_path / "store"))
    digits_file(data / "b.parquet", rows=range(420, 500), split="test")
    grown = run(job, store, InlineExecutor())
    assert grown.run != outcome.run
    assert (grown.trained, grown.reused_cells, grown.cells) == (0, outcome.cells, outcome.cells)
    fresh, other = run_inline(job, str(tmp_path / "fresh"))
    assert fresh.cells == 2 * outcome.cells
    assert published(store, grown.run) == published(other, fresh.run)


def test_an_exemplar_says_where_its_row_is(tmp_path: Path) -> None:
    digits_file(tmp_path / "data" / "a.parquet", rows=range(300), split="train")
    digits_file(tmp_path / "data" / "b.parquet", rows=range(300, 420), split="test")
    outcome, store = run_inline(parquet_job(tmp_path, more="[statistics.exemplars]"), str(tmp_path / "store"))
    weights = _table(store, outcome.run, "patterns").set_index(["model", "site", "unit"])
    images = load_digits().images.reshape(-1, 64) / 16
    chosen = _table(store, outcome.run, "exemplars").query("site == 'hidden0' and kind == 'greatest'")
    assert len(chosen) > 10
    for one in chosen.itertuples():
        assert one.file.endswith("b.parquet")
        unit = weights.loc[(one.model, one.site, one.unit)]
        assert one.z == pytest.approx(unit.weight @ images[300 + one.row] + unit.bias, abs=1e-4)


def test_what_is_said_never_to_be_null_never_is(undisturbed) -> None:
    url, run_id, _ = undisturbed
    store = open_store(url)
    tables = [pq.read_table(io.BytesIO(store.get(key))) for key in store.keys(f"runs/{run_id}/tables/")]
    never = [(table, field) for table in tables for field in table.schema if field.metadata[b"null"] == b"never"]
    assert len(never) > 50
    assert [field.name for table, field in never if table[field.name].null_count] == []


def test_a_receipt_says_where_its_chunk_begins(tmp_path: Path) -> None:
    digits_file(tmp_path / "data" / "a.parquet", rows=range(300), split="train")
    digits_file(tmp_path / "data" / "b.parquet", rows=range(300, 420), split="test", group_rows=20)
    outcome, store = run_inline(parquet_job(tmp_path, chunk_rows=40), str(tmp_path / "store"))
    receipts = _table(store, outcome.run, "receipts")
    for _, of_one in receipts.groupby(["model", "statistic"]):
        assert dict(zip(of_one.first_row, of_one.total, strict=True)) == {0: 40, 40: 40, 80: 40}


def _table(store: Store, run_id: str, name: str) -> pd.DataFrame:
    content = store.get(f"runs/{run_id}/tables/{name}/part-00000.parquet")
    return pq.read_table(io.BytesIO(content)).to_pandas()


@pytest.mark.real
def test_the_executor_changes_no_byte(undisturbed, tmp_path: Path) -> None:
    from pipeline.cluster.executor import executor_at

    _, run_id, expected = undisturbed
    job = small_job(tmp_path)
    store = open_store(str(tmp_path / "store"))
    with executor_at("local", job.resources) as executor:
        outcome = run(job, store, executor)
    assert outcome.run == run_id
    assert published(store, run_id) == expected


def test_object_storage_changes_no_byte(undisturbed, tmp_path: Path, s3_url: str) -> None:
    expected = undisturbed[2]
    outcome, store = run_inline(small_job(tmp_path), s3_url)
    assert published(store, outcome.run) == expected


def test_a_killed_run_is_finished_by_the_next_and_commits_once(undisturbed, tmp_path: Path) -> None:
    _, run_id, expected = undisturbed
    store = open_store(str(tmp_path / "store"))
    command = [sys.executable, "-m", "pipeline.cli", "run", str(write_job(tmp_path / "job.toml")), "--ray", "none"]
    killed = 0
    for wanted in (2, 9):  # cells stored when the plug is pulled
        process = subprocess.Popen([*command, "--store", store.url], env={**os.environ, "NO_COLOR": "1"})
        while process.poll() is None and len(store.keys("states/")) < wanted:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed == 2
    assert store.keys(f"runs/{run_id}/_manifest.json") == []
    outcome = run(small_job(tmp_path), store, InlineExecutor())
    assert outcome.new
    assert outcome.reused_cells >= 9
    assert published(store, run_id) == expected
