from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.errors import ModelError
from pipeline.models.base import Task
from pipeline.models.transformer import FAMILY, TransformerParameters
from tests.models.build import build, disturbed, on_meta, parameters

TEXT = Task((9,), 3, vocabulary=20)
SMALL = {"layers": 2, "width": 8, "heads": 2, "dropout": 0.0}


def tokens(rows: int = 4, length: int = 9) -> torch.Tensor:
    return torch.randint(20, (rows, length), generator=torch.Generator().manual_seed(3))


def torchs_own(model: nn.Module, layers: int, width: int, heads: int) -> nn.TransformerEncoder:
    """PyTorch's encoder with the same weights."""
    layer = nn.TransformerEncoderLayer(
        width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    other = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False).double()
    weights = model.state_dict()
    renamed = {}
    for kind in ("weight", "bias"):
        renamed[f"norm.{kind}"] = weights[f"norm.{kind}"]
        for number in range(layers):
            own, its = f"blocks.{number}", f"layers.{number}"
            qkv = [weights[f"{own}.{part}.{kind}"] for part in ("query", "key", "value")]
            renamed[f"{its}.self_attn.in_proj_{kind}"] = torch.cat(qkv)
            for mine, theirs in (
                ("out", "self_attn.out_proj"),
                ("up", "linear1"),
                ("down", "linear2"),
                ("attention_norm", "norm1"),
                ("dense_norm", "norm2"),
            ):
                renamed[f"{its}.{theirs}.{kind}"] = weights[f"{own}.{mine}.{kind}"]
    other.load_state_dict(renamed)
    return other.eval()


@pytest.mark.parametrize("lengths", [None, (9, 5, 1, 2)])
def test_forward_is_torchs_own_encoder(lengths: tuple[int, ...] | None) -> None:
    model = disturbed(build("transformer", TEXT, **SMALL)).double()
    other = torchs_own(model, 2, 8, 2)
    token = tokens()
    mask = None if lengths is None else torch.arange(9) < torch.tensor(lengths)[:, None]
    weights = model.state_dict()
    x = weights["token.weight"][token] + weights["position.weight"]
    seen = other(x, src_key_padding_mask=None if mask is None else ~mask)
    rows = [row[: len(row) if lengths is None else lengths[index]].mean(0) for index, row in enumerate(seen)]
    expected = torch.stack(rows) @ weights["classifier.weight"].T + weights["classifier.bias"]
    torch.testing.assert_close(model(token, mask), expected, rtol=1e-11, atol=1e-11)


def test_padding_changes_nothing() -> None:
    model = disturbed(build("transformer", TEXT, **SMALL)).double()
    lengths = (9, 5, 1, 2)
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    token = tokens()
    alone = torch.cat([model(row[None, :length]) for row, length in zip(token, lengths, strict=True)])
    torch.testing.assert_close(model(token.where(mask, 19), mask), alone, rtol=1e-11, atol=1e-11)


def test_an_empty_row_gives_numbers() -> None:
    model = build("transformer", TEXT, **SMALL)
    assert bool(torch.isfinite(model(tokens(2), torch.zeros(2, 9, dtype=torch.bool))).all())


def test_the_papers_base_encoder_has_its_size() -> None:
    # 6 layers of: 4 projections, 2 dense layers, 2 LayerNorms; then embeddings, last norm and classifier
    layer = 4 * (512 * 512 + 512) + (512 * 2048 + 2048) + (2048 * 512 + 512) + 2 * 2 * 512
    assert layer == 3_152_384
    rest = 1000 * 512 + 128 * 512 + 2 * 512 + (512 * 5 + 5)
    assert parameters(on_meta("transformer", Task((128,), 5, vocabulary=1000))) == 6 * layer + rest


def test_its_inputs_fit_its_layers() -> None:
    model = build("transformer", TEXT, **SMALL)
    for path, space in FAMILY.inputs(TransformerParameters(**SMALL), TEXT).items():
        assert torch.Size(space.shape).numel() == model.get_submodule(path).weight.shape[1]


def test_refuses_heads_that_do_not_divide_and_data_without_tokens() -> None:
    with pytest.raises(ModelError, match="3 heads do not divide a width of 8"):
        build("transformer", TEXT, **{**SMALL, "heads": 3})
    with pytest.raises(ModelError, match="takes tokens, the data has numbers"):
        build("transformer", Task((9,), 3))
