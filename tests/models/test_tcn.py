from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.errors import ModelError
from pipeline.models.base import Task
from pipeline.models.tcn import FAMILY, TCNParameters
from tests.models.build import build, disturbed, on_meta, parameters

SMALL = {"widths": (4, 4, 5), "kernel": 3, "dropout": 0.0}


def test_the_papers_sequential_mnist_model_has_its_size() -> None:
    # §5, table 1: "70K" for sequential MNIST; v, g and b of 2 convolutions in 8 blocks, a shortcut, a classifier
    convolutions = (25 * 1 * 7 + 50) + 15 * (25 * 25 * 7 + 50)
    expected = convolutions + (25 + 25) + (25 * 10 + 10)
    assert parameters(on_meta("tcn", Task((1, 784), 10))) == expected
    assert 65_000 < expected < 75_000


def numpy_forward(weights: dict[str, torch.Tensor], x: np.ndarray, kernel: int, blocks: int) -> np.ndarray:
    """Every sum written out, one row; time outside."""
    value = {name: tensor.double().numpy() for name, tensor in weights.items()}
    for block in range(blocks):
        shortcut = x
        name = f"blocks.{block}.shortcut"
        if f"{name}.weight" in value:
            shortcut = value[f"{name}.weight"][:, :, 0] @ x + value[f"{name}.bias"][:, None]
        made = x
        for conv in ("conv1", "conv2"):
            name = f"blocks.{block}.{conv}"
            gain, direction = (value[f"{name}.parametrizations.weight.original{part}"] for part in (0, 1))
            weight = gain * direction / np.sqrt((direction**2).sum((1, 2), keepdims=True))
            new = np.zeros((len(weight), x.shape[1]))
            for time in range(x.shape[1]):
                for tap in range(kernel):
                    back = (kernel - 1 - tap) * 2**block
                    if time >= back:
                        new[:, time] += weight[:, :, tap] @ made[:, time - back]
                new[:, time] += value[f"{name}.bias"]
            made = np.maximum(new, 0)
        x = np.maximum(made + shortcut, 0)
    return value["classifier.weight"] @ x[:, -1] + value["classifier.bias"]


def test_forward_is_the_papers() -> None:
    model = disturbed(build("tcn", Task((2, 11), 3), **SMALL)).double()
    x = torch.randn(4, 2, 11, dtype=torch.float64)
    expected = np.stack([numpy_forward(model.state_dict(), row.numpy(), 3, 3) for row in x])
    np.testing.assert_allclose(model(x).detach().numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("time", [0, 4, 9])
def test_no_output_depends_on_what_comes_later(time: int) -> None:
    model = disturbed(build("tcn", Task((2, 10), 3), **SMALL))
    x = torch.randn(3, 2, 10)
    later = x.clone()
    later[:, :, time + 1 :] += 1e6
    seen, changed = (features(model, one) for one in (x, later))
    assert torch.equal(seen[:, :, : time + 1], changed[:, :, : time + 1])


def features(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    for block in model.get_submodule("blocks").children():
        x = block(x)
    return x


def test_sees_as_far_back_as_documented() -> None:
    model = build("tcn", Task((1, 64), 2), widths=(2, 2, 2), kernel=3, dropout=0.0).double()
    # all positive, so that every unit fires and passes its gradient on
    model.load_state_dict({name: value.abs() for name, value in model.state_dict().items()})
    x = torch.rand(1, 1, 64, dtype=torch.float64, requires_grad=True)
    features(model, x)[0, :, -1].sum().backward()
    seen = 1 + 2 * (3 - 1) * (2**3 - 1)
    assert x.grad is not None
    assert x.grad[0, 0, : 64 - seen].abs().max() == 0
    assert x.grad[0, 0, 64 - seen] != 0


def test_padding_behind_a_short_row_changes_nothing() -> None:
    model = disturbed(build("tcn", Task((2, 10), 3), **SMALL))
    x = torch.randn(3, 2, 10)
    lengths = torch.tensor([10, 4, 1])
    mask = torch.arange(10) < lengths[:, None]
    padded = torch.where(mask[:, None], x, 1e6)
    alone = torch.cat([model(row[None, :, :length]) for row, length in zip(x, lengths, strict=True)])
    torch.testing.assert_close(model(padded, mask), alone, rtol=1e-5, atol=1e-5)


def test_its_taps_are_named_by_how_far_they_look_back() -> None:
    spaces = FAMILY.inputs(TCNParameters(**SMALL), Task((2, 10), 3))
    convolutions = {f"blocks.{block}.conv{number}" for block in range(3) for number in (1, 2)}
    assert set(spaces) == convolutions | {"blocks.0.shortcut", "blocks.2.shortcut", "classifier"}
    space = spaces["blocks.2.conv1"]
    assert space.shape == (4, 3)
    assert space.names[3:6] == ("blocks.1 1, 8 back", "blocks.1 1, 4 back", "blocks.1 1, 0 back")
    model = build("tcn", Task((2, 10), 3), **SMALL)
    for path, one in spaces.items():
        weight = model.get_submodule(path).weight
        assert weight.shape[1:] == one.shape


def test_takes_series_only() -> None:
    with pytest.raises(ModelError, match="takes series, the data has image"):
        build("tcn", Task((1, 8, 8), 2))
