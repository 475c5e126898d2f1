"""Objects of a store that are not as they were: each is named, with what to do, and costs no other model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.cells import decode_cell, encode_cell
from pipeline.errors import StoreError
from pipeline.models.base import decode_checkpoint, encode_checkpoint
from tests.operating import call, committed, refused


def test_a_table_edited_by_hand(tmp_path: Path) -> None:
    store = committed(tmp_path)
    (part,) = store.glob("runs/*/tables/models/*.parquet")
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    done = call("verify", "--store", str(store))
    assert done.exit_code == 1
    assert f"{part.relative_to(store)} was changed: SHA-256" in done.output


def open_again(store: Path) -> None:
    """Take the run back to where its cells are there and its rows are not."""
    for path in [*store.glob("runs/*/reduced/*/*"), *store.glob("runs/*/_manifest.json")]:
        path.unlink()


def test_a_state_of_another_version(tmp_path: Path) -> None:
    store = committed(tmp_path)
    open_again(store)
    state = sorted(store.glob("states/*/*/*.safetensors"))[0]
    content = state.read_bytes()
    later = content.replace(b'\\"format\\": 2', b'\\"format\\": 3')
    assert len(later) == len(content)
    assert later != content
    state.write_bytes(later)
    arguments = ("run", str(tmp_path / "job.toml"), "--ray", "none", "--store", str(store))
    refused(call(*arguments), f"{state.relative_to(store)} has format 3", "use the version that wrote it, or delete it")
    state.write_bytes(content[:-1])
    refused(call(*arguments), f"{state.relative_to(store)} is damaged", "delete it and run again")
    assert not list(store.glob("runs/*/_manifest.json"))
    state.unlink()
    assert call(*arguments).exit_code == 0
    with pytest.raises(StoreError, match=r"a state object has format None"):
        decode_cell(content.replace(b'\\"format\\": 2', b'\\"tamrof\\": 2'))


def reencoded(path: Path, **changes: Any) -> None:
    """Write a cell as another program, or one on other weights, would have."""
    path.write_bytes(encode_cell(replace(decode_cell(path.read_bytes()), **changes)))


def test_states_of_weights_that_were_made_anew(tmp_path: Path) -> None:
    store = committed(tmp_path)
    open_again(store)
    weights = sorted(store.glob("models/*.safetensors"))[0]
    before = decode_checkpoint(weights.read_bytes())
    weights.write_bytes(encode_checkpoint(replace(before, weights={n: w + 1 for n, w in before.weights.items()})))
    arguments = ("run", str(tmp_path / "job.toml"), "--ray", "none", "--store", str(store))
    done = call(*arguments)
    refused(done, f"states/{weights.stem}/", "was measured on other weights", "made anew since: delete what is below")
    assert len(list(store.glob("runs/*/reduced/*/_done.json"))) == 1, "the other model is done"
    shutil.rmtree(store / "states" / weights.stem)
    (tables,) = store.glob("runs/*/tables")
    refused(call(*arguments), "part-00000.parquet holds other rows than belong there", "remove what is below runs/")
    shutil.rmtree(tables)
    assert call(*arguments).exit_code == 0
    assert call("verify", "--deep", "--store", str(store)).exit_code == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda state: {name: value[:-1] for name, value in state.items()},
            "has null.fired as torch.int64 (1, 2), not torch.int64 (2, 0)",
        ),
        (
            lambda state: {name: value.float() for name, value in state.items()},
            "has null.fired as torch.float32 (2, 2), not torch.int64 (2, 0)",
        ),
        (lambda state: {f"{name}s": value for name, value in state.items()}, "has null.fireds, "),
    ],
)
def test_states_that_do_not_fit_cost_no_other_model(
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], said: str, tmp_path: Path
) -> None:
    store = committed(tmp_path)
    open_again(store)
    path = sorted(store.glob("states/*/*/*.safetensors"))[0]
    cell = decode_cell(path.read_bytes())
    reencoded(path, states={site: change(dict(state)) for site, state in cell.states.items()})
    arguments = ("run", str(tmp_path / "job.toml"), "--ray", "none", "--store", str(store))
    refused(call(*arguments), f"{path.relative_to(store)}: ", said, "delete it and run again")
    assert len(list(store.glob("runs/*/reduced/*/_done.json"))) == 1, "the other model is done"
    path.unlink()
    assert call(*arguments).exit_code == 0


def test_a_damaged_checkpoint_is_not_its_models_fault(tmp_path: Path) -> None:
    store = committed(tmp_path)
    open_again(store)
    (weights, *_) = sorted(store.glob("models/*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    done = call("run", str(tmp_path / "job.toml"), "--ray", "none", "--store", str(store))
    refused(done, f"{weights.relative_to(store)} is damaged", "delete it and run again")
    assert not list(store.glob("runs/*/_manifest.json"))


def test_reduced_rows_of_another_model_or_damaged(tmp_path: Path) -> None:
    store = committed(tmp_path)
    arguments = ("run", str(tmp_path / "job.toml"), "--ray", "none", "--store", str(store))
    for path in [*store.glob("runs/*/_manifest.json"), *store.glob("runs/*/tables/*/*")]:
        path.unlink()
    one, other = sorted(store.glob("runs/*/reduced/*"))
    sound = (one / "neurons.arrow.zst").read_bytes()
    (one / "neurons.arrow.zst").write_bytes((other / "neurons.arrow.zst").read_bytes())
    said = f"reduced/{one.name}/neurons.arrow.zst holds rows of model {other.name}: remove what is below runs/"
    refused(call(*arguments), said)
    flipped = sound[:-50] + bytes([sound[-50] ^ 16]) + sound[-49:]
    for content in (sound[:-9], sound[:99] + bytes(9) + sound[108:], flipped, b""):
        (one / "neurons.arrow.zst").write_bytes(content)
        refused(call(*arguments), f"reduced/{one.name}/neurons.arrow.zst is damaged", "remove what is below runs/")
    assert not list(store.glob("runs/*/_manifest.json"))
    shutil.rmtree(one)
    assert call(*arguments).exit_code == 0
    assert call("verify", "--deep", "--store", str(store)).exit_code == 0
