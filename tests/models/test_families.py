"""What holds of every family."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from pipeline.errors import ModelError, StoreError
from pipeline.models.base import Checkpoint, Task, decode_checkpoint, encode_checkpoint
from pipeline.registry import families
from tests.models.build import EXAMPLES, build, forward_inputs, on_meta, parameters

every_family = pytest.mark.parametrize("name", sorted(families()))


def example(name: str, seed: int = 0) -> torch.nn.Module:
    return build(name, EXAMPLES[name].task, seed=seed, **EXAMPLES[name].hyperparameters)


@every_family
def test_weights_are_a_function_of_the_seed(name: str) -> None:
    first, again, other = (example(name, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@every_family
def test_a_model_gives_what_its_task_says(name: str) -> None:
    inputs = forward_inputs(name)
    out = example(name)(*inputs)
    task = EXAMPLES[name].task
    each = (task.shape[0], task.vocabulary) if families()[name].objective == "next token" else (task.outputs,)
    assert out.shape == (len(inputs[0]), *each)
    assert bool(torch.isfinite(out).all())


@every_family
def test_rows_do_not_depend_on_each_other(name: str) -> None:
    if families()[name].whole:
        return
    model = example(name).double()
    inputs = [one.double() if one.is_floating_point() else one for one in forward_inputs(name, rows=5)]
    together = model(*inputs)
    alone = torch.cat([model(*[one[row : row + 1] for one in inputs]) for row in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


@every_family
def test_gradients_reach_every_parameter(name: str) -> None:
    model = example(name)
    # ReLUs and zeros of an initialisation may hide a parameter from one batch
    for seed in range(8):
        model(*forward_inputs(name, rows=32, seed=seed)).square().sum().backward()
    stuck = [key for key, value in model.named_parameters() if value.grad is None]
    assert not stuck


@every_family
def test_a_checkpoint_comes_back_bit_for_bit(name: str) -> None:
    weights = {key: value.clone() for key, value in example(name).state_dict().items()}
    content = encode_checkpoint(Checkpoint(weights, {"step": 3}))
    assert content == encode_checkpoint(Checkpoint(dict(reversed(weights.items())), {"step": 3}))
    back = decode_checkpoint(content)
    other = example(name, seed=9)
    other.load_state_dict(back.weights)
    inputs = forward_inputs(name)
    assert back.record == {"step": 3}
    assert torch.equal(other(*inputs), example(name)(*inputs))


def test_a_damaged_checkpoint_is_refused() -> None:
    content = encode_checkpoint(Checkpoint({"w": torch.ones(4)}, {}))
    for damaged in (content[:-1], content[:20], b""):
        with pytest.raises(StoreError, match=r"models/m is damaged .*delete it and run again"):
            decode_checkpoint(damaged, key="models/m")


@every_family
def test_what_inputs_mean_is_said_of_sites_that_exist(name: str) -> None:
    family, chosen = families()[name], EXAMPLES[name]
    model = example(name)
    for path, space in family.inputs(family.parameters(**chosen.hyperparameters), chosen.task).items():
        model.get_submodule(path)
        assert not space.names or len(space.names) == torch.Size(space.shape).numel()


@every_family
def test_an_unknown_hyperparameter_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="extra_forbidden"):
        families()[name].parameters(wdith=3)


def test_sizes_of_the_demo_models() -> None:
    digits = Task((1, 8, 8), 10)
    assert parameters(on_meta("mlp", digits, widths=(128, 64))) == 64 * 128 + 128 + 128 * 64 + 64 + 64 * 10 + 10
    assert parameters(on_meta("cnn", digits)) == 16 * 9 + 32 + 16 * 32 * 9 + 64 + 32 * 4 * 10 + 10


def test_a_cnn_refuses_to_halve_an_image_to_nothing() -> None:
    with pytest.raises(ModelError, match="4 blocks halve"):
        build("cnn", Task((1, 8, 8), 10), widths=(4, 4, 4, 4))
