"""The table of training curves: what each checkpoint's record holds, up to its step."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from pipeline.executor import InlineExecutor
from pipeline.models.base import checkpoint_key, decode_checkpoint
from pipeline.query import ask, connect
from pipeline.run import run
from pipeline.store import open_store
from tests.census import small_job


def test_a_model_has_the_points_up_to_its_step(tmp_path: Path):
    job, store = small_job(tmp_path), open_store(str(tmp_path / "store"))
    training = {"steps": 30, "checkpoints": (10,), "schedule": "cosine"}
    run(
        job.model_copy(update={"models": (job.models[0].model_copy(update={"training": training}),)}),
        store,
        InlineExecutor(),
    )
    with closing(connect(store, tables={"curves", "models"})) as con:
        asked = "SELECT name, model, quantity, curves.step, value FROM curves JOIN models USING (model) ORDER BY ALL"
        rows = list(ask(con, asked).rows)
    names = {name: model for name, model, *_ in rows}
    assert set(names) == {"mlp-0", "mlp-0@10"}  # an untrained model has no curve
    for name, last in (("mlp-0", 30), ("mlp-0@10", 10)):
        found = {(quantity, step): value for one, _, quantity, step, value in rows if one == name}
        assert set(found) == {(quantity, step) for quantity in ("loss", "learning_rate") for step in range(1, last + 1)}
        record = decode_checkpoint(store.get(checkpoint_key(names[name]))).record
        assert found == {(quantity, step): value for step, quantity, value in record["curve"]}
    whole = {(quantity, step): value for one, _, quantity, step, value in rows if one == "mlp-0"}
    assert whole["learning_rate", 1] > whole["learning_rate", 30] > 0


def test_a_training_that_ended_early_says_when(tmp_path: Path):
    job, store = small_job(tmp_path), open_store(str(tmp_path / "store"))
    training = {"steps": 60, "checkpoints": (5,), "held_out": 0.3, "patience": 1, "evaluate_steps": 5}
    job = job.model_copy(
        update={"models": (job.models[0].model_copy(update={"training": training | {"learning_rate": 1.0}}),)}
    )
    run(job, store, InlineExecutor())
    with closing(connect(store, tables={"curves", "models"})) as con:
        stopped = dict(ask(con, "SELECT name, stopped FROM models").rows)
        asked = "SELECT max(curves.step) FROM curves JOIN models USING (model) WHERE quantity = 'held_out_loss'"
        ((last,),) = ask(con, asked).rows
    assert last < 60
    assert stopped == {"mlp-0": last, "mlp-0@5": None, "mlp-0-init": None}
