"""A run from end to end: reuse of what exists, the same bytes however it runs, resumption after a kill."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from sklearn.datasets import load_digits

from pipeline import pack
from pipeline.errors import StoreError
from pipeline.executor import InlineExecutor
from pipeline.pack import PackTask
from pipeline.run import run
from pipeline.store import Store, open_store
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


def test_parts_that_another_version_cut_otherwise_are_not_committed(tmp_path: Path, monkeypatch) -> None:
    class Killed(InlineExecutor):
        def map(self, function, tasks):
            yield from super().map(function, tasks)
            if isinstance(tasks[0], PackTask):
                raise KeyboardInterrupt

    store, job = open_store(str(tmp_path / "store")), tiny_job(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(job, store, Killed())
    monkeypatch.setattr(pack, "PART_BYTES", 1)
    with pytest.raises(StoreError, match=r"part-00000\.parquet holds rows of other models than belong there"):
        run(job, store, InlineExecutor())
    assert not [key for key in store.keys("runs/") if key.endswith("_manifest.json")]


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


def _table(store: Store, run_id: str, name: str) -> pd.DataFrame:
    content = store.get(f"runs/{run_id}/tables/{name}/part-00000.parquet")
    return pq.read_table(io.BytesIO(content)).to_pandas()


def test_the_executor_changes_no_byte(undisturbed, tmp_path: Path) -> None:
    from pipeline.cluster import executor_at

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
