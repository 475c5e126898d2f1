from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pipeline.errors import ModelError
from pipeline.models.base import Task
from tests.models.build import build, disturbed, on_meta, parameters

TEXT = Task((9,), 0, vocabulary=20)
SMALL = {"layers": 2, "width": 8, "heads": 2, "dropout": 0.0}


def tokens(rows: int = 4, length: int = 9) -> torch.Tensor:
    return torch.randint(20, (rows, length), generator=torch.Generator().manual_seed(3))


def test_the_smallest_published_model_has_its_size() -> None:
    # 124,439,808 is what the released weights count, the head being the token embedding
    assert parameters(on_meta("gpt", Task((1024,), 0, vocabulary=50_257))) == 124_439_808


def numpy_forward(weights: dict[str, torch.Tensor], token: list[int], *, layers: int, heads: int) -> np.ndarray:
    """One row, every head and position by itself, in float64."""
    value = {name: tensor.double().numpy() for name, tensor in weights.items()}

    def dense(name: str, x: np.ndarray) -> np.ndarray:
        return x @ value[f"{name}.weight"].T + value[f"{name}.bias"]

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        scale = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return centred / scale * value[f"{name}.weight"] + value[f"{name}.bias"]

    x = np.stack([value["token.weight"][one] + value["position.weight"][at] for at, one in enumerate(token)])
    for layer in range(layers):
        name = f"blocks.{layer}"
        h = norm(f"{name}.attention_norm", x)
        query, key, val = (dense(f"{name}.{part}", h) for part in ("query", "key", "value"))
        size = x.shape[1] // heads
        mixed = np.zeros_like(x)
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            for time in range(len(token)):
                logits = key[: time + 1, part] @ query[time, part] / math.sqrt(size)
                share = np.exp(logits - logits.max())
                mixed[time, part] = share / share.sum() @ val[: time + 1, part]
        x = x + dense(f"{name}.out", mixed)
        h = dense(f"{name}.up", norm(f"{name}.dense_norm", x))
        h = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + dense(f"{name}.down", h)
    return norm("norm", x) @ value["token.weight"].T


def test_forward_is_the_papers() -> None:
    model = disturbed(build("gpt", TEXT, **SMALL)).double()
    token = tokens()
    expected = np.stack([numpy_forward(model.state_dict(), row.tolist(), layers=2, heads=2) for row in token])
    np.testing.assert_allclose(model(token).detach().numpy(), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("time", [0, 3, 7])
def test_no_logit_depends_on_a_later_token(time: int) -> None:
    model = disturbed(build("gpt", TEXT, **SMALL))
    token = tokens()
    later = token.clone()
    later[:, time + 1 :] = (later[:, time + 1 :] + 1) % 20
    assert torch.equal(model(token)[:, : time + 1], model(later)[:, : time + 1])
    assert not torch.equal(model(token)[:, time + 1 :], model(later)[:, time + 1 :])


def test_initial_weights_have_the_published_spread() -> None:
    model = build("gpt", TEXT, layers=8, width=128, heads=4)
    for path, expected in (("blocks.3.up", 0.02), ("blocks.3.down", 0.02 / 4), ("blocks.0.out", 0.02 / 4)):
        assert abs(model.get_parameter(f"{path}.weight").std().item() / expected - 1) < 0.03
    assert bool((model.get_parameter("norm.weight") == 1).all())


def test_an_untrained_model_finds_all_tokens_about_equally_likely() -> None:
    model = build("gpt", TEXT, layers=2, width=64, heads=4)
    token = tokens()
    loss = torch.nn.functional.cross_entropy(model(token)[:, :-1].flatten(0, 1), token[:, 1:].flatten())
    assert abs(loss.item() - math.log(20)) < 0.1


def test_refuses_heads_that_do_not_divide() -> None:
    with pytest.raises(ModelError, match="3 heads do not divide a width of 8"):
        build("gpt", TEXT, **{**SMALL, "heads": 3})
