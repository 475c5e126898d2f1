from __future__ import annotations

import io
import os
import pickle
import subprocess
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from pydantic import ValidationError
from torch import nn

from pipeline.errors import DataError, JobError, ModelError
from pipeline.filesystems import filesystem
from pipeline.foreign.architecture import MORE_PACKAGES
from pipeline.foreign.files import digests_of, find_models, pin_of, read_model
from pipeline.foreign.spec import LoadSpec
from pipeline.foreign.state import read_state, superfluous
from pipeline.hashing import sha256
from pipeline.models.base import Checkpoint, Task, encode_checkpoint
from tests.foreign.modules import load_module
from tests.models.build import build

TASK = Task((1, 4, 4), 3)
SPEC = {"family": "mlp", "arguments": {"widths": (8,)}}


def model(seed: int = 0) -> nn.Module:
    return build("mlp", TASK, seed=seed, widths=(8,))


def as_pt(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def as_safetensors(state: dict[str, torch.Tensor]) -> bytes:
    return safetensors.torch.save({name: value.clone() for name, value in state.items()})


def loaded(name: str, content: bytes, **spec: Any) -> nn.Module:
    return load_module(LoadSpec(url=name, **spec), {name: content}, TASK)


class Malicious:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    ("name", "content", "more"),
    [
        ("m.safetensors", lambda state: as_safetensors(state), {}),
        ("m.pt", lambda state: as_pt(state), {}),
        ("m.pth", lambda state: as_pt({"epoch": 3, "model": {"ema": state}}), {"key": "model.ema"}),
        (
            "m.ckpt",
            lambda state: as_pt({f"module.{one}": value for one, value in state.items()}),
            {"prefix": "module."},
        ),
        ("own.safetensors", lambda state: encode_checkpoint(Checkpoint(state, {"step": 7})), {}),
    ],
)
def test_weights_come_from_every_form(name: str, content: Any, more: dict[str, Any]) -> None:
    expected = model(seed=5)
    found = loaded(name, content(dict(expected.state_dict())), **SPEC, **more)
    x = torch.randn(3, 1, 4, 4)
    assert torch.equal(found(x), expected(x))
    assert not found.training


def test_the_default_generator_is_left_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    loaded("m.pt", as_pt(model(5).state_dict()), **SPEC)
    assert not torch.equal(before, torch.get_rng_state())  # `model` drew
    torch.manual_seed(3)
    content = as_pt(build("mlp", TASK, widths=(8,)).state_dict())
    before = torch.get_rng_state()
    loaded("m.pt", content, **SPEC)
    assert torch.equal(before, torch.get_rng_state())


def test_names_and_shapes_that_do_not_fit_are_all_listed() -> None:
    state = dict(model().state_dict())
    state["extra.weight"] = state.pop("hidden0.bias")
    state["classifier.weight"] = torch.zeros(3, 9)
    with pytest.raises(ModelError) as caught:
        loaded("m.safetensors", as_safetensors(state), **SPEC)
    assert str(caught.value) == (
        "m.safetensors does not fit the model: 1 missing: hidden0.bias; 1 unexpected: extra.weight; "
        "1 of another shape: classifier.weight is (3, 9), expected (3, 8)"
    )


@pytest.mark.parametrize("kind", [torch.int8, torch.bool, torch.complex64])
def test_numbers_of_another_kind_are_no_weights(kind: torch.dtype) -> None:
    state = {**model().state_dict(), "hidden0.weight": torch.ones(8, 16, dtype=kind)}
    said = rf"1 of another kind: hidden0\.weight is {kind}, expected torch\.float32"
    with pytest.raises(ModelError, match=said):
        loaded("m.safetensors", as_safetensors(state), **SPEC)
    half = {name: value.to(torch.bfloat16) for name, value in model().state_dict().items()}
    assert loaded("m.safetensors", as_safetensors(half), **SPEC).get_parameter("hidden0.weight").dtype == torch.float32


def test_long_lists_are_cut() -> None:
    state = {f"w{number}": torch.zeros(1) for number in range(100)}
    with pytest.raises(ModelError, match=r"100 unexpected: w0, w1, w10, .* and 92 more"):
        loaded("m.safetensors", as_safetensors(dict(sorted(state.items()))), **SPEC)


@pytest.mark.parametrize("name", ["m.safetensors", "m.pt"])
@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_truncated_file_is_refused(name: str, keep: float) -> None:
    whole = as_pt(model().state_dict()) if name == "m.pt" else as_safetensors(dict(model().state_dict()))
    kept = whole[: int(keep * len(whole)) if keep < 1 else int(keep)]
    with pytest.raises(ModelError, match=f"{name} cannot be read: .*{len(kept)} bytes"):
        loaded(name, kept, **SPEC)


def test_nothing_is_ever_unpickled(tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    for content in (as_pt({"w": Malicious(str(trap))}), pickle.dumps(Malicious(str(trap)))):
        with pytest.raises(ModelError, match=r"m.pt cannot be read"):
            loaded("m.pt", content, **SPEC)
    assert not trap.exists()
    whole_module = as_pt(model())
    with pytest.raises(ModelError, match="cannot be read"):
        loaded("m.pt", whole_module, **SPEC)


def test_tensors_that_cannot_be_kept_are_named() -> None:
    state = {**model().state_dict(), "hidden0.weight": torch.eye(8, 16).to_sparse()}
    with pytest.raises(ModelError, match=r"holds sparse or quantised tensors, .*: hidden0.weight"):
        loaded("m.pt", as_pt(state), **SPEC)


def test_torchscript_is_refused_with_what_to_use_instead() -> None:
    buffer = io.BytesIO()
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.save(torch.jit.script(model()), buffer)
    with pytest.raises(ModelError, match=r"m.pt is a TorchScript program, .*state_dict .*torch.export as .pt2"):
        loaded("m.pt", buffer.getvalue(), **SPEC)


@pytest.mark.parametrize(
    ("value", "key", "said"),
    [
        ({"state_dict": {}, "epoch": 3}, None, r"holds state_dict \(dict\), epoch \(int\); .*load.key"),
        ({"state_dict": {}}, "state_dict.ema", r"no entry 'ema'"),
        ({"state_dict": {}}, "state", r"no entry 'state' .*did you mean 'state_dict'"),
        ([1, 2], None, "holds a list"),
    ],
)
def test_what_is_not_weights_is_said(value: Any, key: str | None, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        read_state("m.pt", as_pt(value), key=key)


def test_a_prefix_that_makes_two_weights_one_is_refused() -> None:
    state = dict(model().state_dict())
    both = {**state, "module.hidden0.bias": state["hidden0.bias"] + 1}
    with pytest.raises(ModelError, match=r"m.pt has weights with the prefix 'module\.' and without it: hidden0.bias"):
        read_state("m.pt", as_pt(both), prefix="module.")


@pytest.mark.parametrize("prefix", ["", "encoder."])
def test_what_a_module_lacks_of_a_part_that_it_has_is_told_from_other_parts(prefix: str) -> None:
    layers = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 2)])
    module = nn.ModuleDict({"layers": layers, "norm": nn.LayerNorm(2)})
    lacking = ["layers.0.bias", "layers.2.weight", "layers.2.inner.weight", "norm.running"]
    other = ["head.weight", "head.layers.0.weight", "scale"]
    assert superfluous(module, [prefix + name for name in other + lacking], base="encoder") == [
        prefix + name for name in lacking
    ]


def test_any_modules_class_can_be_built_with_arguments() -> None:
    expected = nn.Linear(4, 2)
    found = loaded(
        "m.pt", as_pt(expected.state_dict()), builder="torch.nn:Linear", arguments={"in_features": 4, "out_features": 2}
    )
    assert torch.equal(found.weight, expected.weight)


@pytest.mark.parametrize(
    ("builder", "said"),
    [
        ("os:system", "package os is not allowed"),
        ("tests.foreign.test_state:Own", "package tests is not allowed"),
        ("torch.hub:load", "no subclass of torch.nn.Module"),
        ("torch.utils.cpp_extension:load", "no subclass of torch.nn.Module"),
        ("torch.nn:Linaer", "no subclass of torch.nn.Module"),
        ("torch.no_such:Linear", "cannot be imported"),
    ],
)
def test_what_may_not_be_built_is_refused(builder: str, said: str) -> None:
    with pytest.raises((ModelError, JobError), match=said):
        loaded("m.pt", as_pt({}), builder=builder)


def test_a_constructor_that_refuses_is_quoted() -> None:
    with pytest.raises(ModelError, match=r"torch.nn:Linear cannot be built of .*TypeError"):
        loaded("m.pt", as_pt({}), builder="torch.nn:Linear", arguments={"width": 3})


class Own(nn.Linear):
    """A class of a package that is allowed by the environment alone."""


def make_own(width: int) -> nn.Module:
    return Own(width, width)


def test_the_environment_can_allow_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MORE_PACKAGES, "others, tests")
    content = as_pt(Own(3, 3).state_dict())
    here = "tests.foreign.test_state"
    assert isinstance(loaded("m.pt", content, builder=f"{here}:make_own", arguments={"width": 3}), nn.Linear)
    given = {"in_features": 3, "out_features": 3}
    assert type(loaded("m.pt", content, builder=f"{here}:Own", arguments=given)).__name__ == "Own"


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({}, "name load.family, load.builder or load.timm"),
        ({"family": "mpl"}, "did you mean 'mlp'"),
        ({"family": "mlp", "arguments": {"width": 3}}, "load.arguments.width"),
        ({"family": "tcn"}, "takes series, the data has image"),
    ],
)
def test_an_architecture_that_is_missing_or_wrong_is_said(spec: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        loaded("m.pt", as_pt({}), **spec)


def test_a_table_with_two_architectures_is_refused() -> None:
    with pytest.raises(ValidationError, match="only without family"):
        LoadSpec(url="m.pt", family="mlp", builder="torch.nn:Linear")
    with pytest.raises(ValidationError, match=r"package.module:name"):
        LoadSpec(url="m.pt", builder="torch.nn.Linear")


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def test_a_glob_is_many_models_with_names_that_tell_them_apart(tmp_path: Path) -> None:
    for run in range(3):
        for step in (100, 200):
            write(tmp_path / f"run{run}" / f"{step}.safetensors", as_safetensors(dict(model(run).state_dict())))
            write(tmp_path / f"run{run}" / "notes.txt", b"no model")
    spec = LoadSpec(url="x", **SPEC)
    found = find_models(f"{tmp_path}/run*/*.safetensors")
    assert [one.name for one in found] == [f"run{run}/{step}" for run in range(3) for step in (100, 200)]
    assert [one.name for one in find_models(f"{tmp_path}/run1")] == ["100", "200"]
    assert [one.name for one in find_models(f"{tmp_path}/run1/100.safetensors")] == ["100"]
    digests = [digests_of(one) for one in found]
    assert len({tuple(one.values()) for one in digests}) == 3  # two checkpoints of a run have the same weights here
    assert digests[0] == {"100.safetensors": sha256((tmp_path / "run0/100.safetensors").read_bytes())}
    contents = read_model(found[2], digests[2])
    x = torch.randn(2, 1, 4, 4)
    assert torch.equal(load_module(spec, contents, TASK)(x), model(1)(x))


def test_another_file_than_the_pinned_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write(path, as_safetensors(dict(model().state_dict())))
    pin = sha256(path.read_bytes())
    (found,) = find_models(str(path))
    assert read_model(found, {"m.safetensors": pin})
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(DataError, match=f"expected {pin}"):
        read_model(found, {"m.safetensors": pin})
    with pytest.raises(ValidationError, match="sha256"):
        LoadSpec(url="x", sha256="abc")


def test_several_models_are_pinned_by_what_sha256sum_says_of_them(tmp_path: Path) -> None:
    for name in ("b/2.pt", "b/1.pt", "a.pt", "b/n.txt"):
        write(tmp_path / "models" / name, name.encode())
    found = find_models(f"{tmp_path}/models")
    program = "LC_ALL=C sha256sum a.pt b/1.pt b/2.pt | sha256sum"
    said = subprocess.run(["bash", "-c", program], cwd=tmp_path / "models", capture_output=True, text=True, check=True)
    assert pin_of(found, [digests_of(one) for one in found]) == said.stdout.split()[0]
    assert pin_of(found[:1], [digests_of(found[0])]) == sha256(b"a.pt")


def test_no_model_at_all_is_said(tmp_path: Path) -> None:
    write(tmp_path / "notes.txt", b"")
    with pytest.raises(DataError, match="no model is there"):
        find_models(str(tmp_path))


def test_models_lie_on_any_url() -> None:
    content = as_safetensors(dict(model().state_dict()))
    fs, path = filesystem("memory://models/a.safetensors")
    fs.pipe_file(path, content)
    (found,) = find_models("memory://models/a.safetensors")
    assert digests_of(found) == {"a.safetensors": sha256(content)}
    assert read_model(found, digests_of(found)) == {"a.safetensors": content}


def test_a_models_id_depends_on_what_it_is_and_not_on_where() -> None:
    first = LoadSpec(url="a.pt", **SPEC)
    assert first.model_id("0" * 64) == LoadSpec(url="b.pt", sha256="0" * 64, **SPEC).model_id("0" * 64)
    assert first.model_id("0" * 64) != first.model_id("1" * 64)
    assert first.model_id("0" * 64) != LoadSpec(url="a.pt", family="mlp", arguments={"widths": (9,)}).model_id("0" * 64)
