from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.batch import Batch
from pipeline.errors import ModelError
from pipeline.flow.discover import discover
from pipeline.foreign.call import Call
from pipeline.foreign.spec import LoadSpec
from pipeline.models.base import Task
from tests.foreign.modules import load_module
from tests.foreign.test_state import Malicious


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(4 * 36, 10)]
    return nn.Sequential(*layers).eval()


def exported(model: nn.Module) -> bytes:
    buffer = io.BytesIO()
    rows = torch.export.Dim.DYNAMIC
    torch.export.save(torch.export.export(model, (torch.randn(3, 1, 8, 8),), dynamic_shapes=({0: rows},)), buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def program() -> bytes:
    return exported(convolutional())


def loaded(content: bytes) -> nn.Module:
    return load_module(LoadSpec(url="m.pt2"), {"m.pt2": content}, Task((1, 8, 8), 10))


def changed(content: bytes, entry: str, change: Callable[[Any], Any] | bytes) -> bytes:
    """The archive with one of its entries changed, or with one more."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w") as new:
        names = old.namelist()
        for name in names:
            value = old.read(name)
            if name == entry:
                value = change if isinstance(change, bytes) else json.dumps(change(json.loads(value))).encode()
            new.writestr(name, value)
        if entry not in names:
            assert isinstance(change, bytes)
            new.writestr(entry, change)
    return made.getvalue()


def test_a_program_computes_what_its_model_did(program: bytes) -> None:
    module, model = loaded(program), convolutional()
    x = torch.randn(7, 1, 8, 8)
    torch.testing.assert_close(module(x), model(x))
    assert module.eval() is module
    found = discover(module, Batch((x,), torch.arange(7)))
    assert [(site.gate, site.folded) for site in found.sites] == [("relu", ("1",)), ("identity", ())]


class Marked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.out = nn.Embedding(20, 8), nn.Linear(8, 10)

    def forward(self, token: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.out((self.embedding(token) * mask[..., None]).sum(1))


@pytest.mark.parametrize("positional", [0, 1, 2])
def test_a_program_takes_its_arguments_however_it_was_exported(positional: int) -> None:
    token, mask = torch.randint(20, (3, 8)), torch.rand(3, 8) > 0.5
    given = {"token": token, "mask": mask}
    args, kwargs = tuple(given.values())[:positional], dict(list(given.items())[positional:])
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(Marked().eval(), args, kwargs), buffer)
    module, expected = loaded(buffer.getvalue()), Marked()(token, mask)
    for some, named in (((token, mask), {}), ((token,), {"mask": mask}), ((), given)):
        torch.testing.assert_close(module(*some, **named), expected)
        batch = Batch(some, torch.arange(3), kwargs=named)
        torch.testing.assert_close(Call(None, 10).shown(batch).forward(module), expected)
    with pytest.raises(ModelError, match=r"its forward does not take \(x\): missing a required argument: 'mask'"):
        Call(None, 10).shown(Batch((token,), torch.arange(3))).forward(module)


def test_a_program_for_training_is_refused() -> None:
    with pytest.raises(ModelError, match=r"in training mode .*call eval\(\) before"):
        loaded(exported(convolutional().train()))


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.99])
def test_a_truncated_program_is_refused(program: bytes, keep: float) -> None:
    with pytest.raises(ModelError, match=r"m.pt2 (is damaged|holds)"):
        loaded(program[: int(keep * len(program)) if keep < 1 else int(keep)])


def first_target(value: str) -> Callable[[Any], Any]:
    def change(program: Any) -> Any:
        program["graph_module"]["graph"]["nodes"][0]["target"] = value
        return program

    return change


def expression(value: str) -> Callable[[Any], Any]:
    """Every expression of the program replaced."""

    def change(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: value if key == "expr_str" else change(one) for key, one in node.items()}
        return [change(one) for one in node] if isinstance(node, list) else node

    return change


def pickled_weight(config: Any) -> Any:
    config["config"]["0.weight"]["use_pickle"] = True
    return config


MODEL, WEIGHTS = "archive/models/model.json", "archive/data/weights/model_weights_config.json"


@pytest.mark.parametrize(
    ("entry", "change", "said"),
    [
        (MODEL, first_target("torch.hub.load"), "operator torch.hub.load"),
        (MODEL, first_target("torch.ops.aten.from_file.default"), "operator torch.ops.aten.from_file"),
        (MODEL, first_target("#extension:x"), "operator #extension"),
        (MODEL, expression("__import__('os').system('true')"), "expression __import__"),
        (MODEL, expression("Symbol('s0').__class__"), "expression Symbol"),
        (MODEL, expression("open"), "expression open"),
        (WEIGHTS, pickled_weight, "a tensor is pickled"),
        ("archive/data/constants/custom_obj_0", b"x", "holds archive/data/constants/custom_obj_0"),
        ("archive/data/constants/opaque_obj_0", b"x", "holds archive/data/constants/opaque_obj_0"),
        ("archive/data/aotinductor/model/x.so", b"x", "holds archive/data/aotinductor"),
        ("archive/data/weights/model.pt", b"x", "holds archive/data/weights/model.pt"),
    ],
)
def test_what_a_plain_program_needs_not_is_refused(program: bytes, entry: str, change: Any, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        loaded(changed(program, entry, change))


def test_sample_inputs_are_not_unpickled_either(program: bytes, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    buffer = io.BytesIO()
    torch.save((Malicious(str(trap)),), buffer)
    for content in (buffer.getvalue(), pickle.dumps(Malicious(str(trap)))):
        with pytest.raises(ModelError, match="cannot be loaded"):
            loaded(changed(program, "archive/data/sample_inputs/model.pt", content))
    assert not trap.exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
