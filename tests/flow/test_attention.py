"""Attention: projections split by name, the fused path off, masked positions no presentations."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from pipeline.batch import Batch
from pipeline.flow.discover import discover
from pipeline.flow.tap import tapped_forward
from tests.flow.models import Free, linear, numbers
from tests.flow.shown import batch_of, show


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_layer_has_all_its_projections(batch_first, norm_first):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first, norm_first=norm_first, dtype=torch.float64)
    x = numbers(4, 5, 8)
    shown = show(layer, batch_of(x if batch_first else x.transpose(0, 1), rows=4))
    names = [site.name for site in shown.discovery.sites]
    assert names == [
        *(f"self_attn.in_proj.{part}" for part in "qkv"),
        "self_attn.out_proj",
        "linear1",
        "linear2",
    ]
    for index, part in enumerate("qkv"):
        site = shown.site(f"self_attn.in_proj.{part}")
        torch.testing.assert_close(site.raw_UD, layer.self_attn.in_proj_weight[8 * index : 8 * index + 8].detach())
    assert {shown.z[name].shape[:2] for name in names} == {(4, 5)}
    h = functional.layer_norm(x, (8,)) if norm_first else x
    torch.testing.assert_close(shown.x["self_attn.in_proj.q"][:, :, 0], h)
    assert shown.site("linear1").gate == "relu"
    assert shown.site("linear1").folded == (("norm2",) if norm_first else ())


def test_the_fused_path_is_off_and_restored():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    x = torch.randn(4, 5, 8)
    with torch.inference_mode():
        expected = layer.eval()(x)
    assert torch.backends.mha.get_fastpath_enabled()
    shown = show(layer, batch_of(x))
    assert torch.backends.mha.get_fastpath_enabled()
    torch.testing.assert_close(shown.out, expected)
    assert shown.calls["self_attn.out_proj"] == 1


def test_cross_attention_takes_each_part_from_its_own_source():
    attention = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    q, kv = numbers(3, 4, 8), numbers(3, 6, 8)
    shown = show(Free(lambda self, q, kv: self.a(q, kv, kv)[0], a=attention), batch_of(q, kv))
    assert [site.name for site in shown.discovery.sites] == ["a.in_proj.q", "a.in_proj.k", "a.in_proj.v", "a.out_proj"]
    torch.testing.assert_close(shown.x["a.in_proj.q"][:, :, 0], q)
    torch.testing.assert_close(shown.x["a.in_proj.v"][:, :, 0], kv)
    w, b = attention.in_proj_weight, attention.in_proj_bias
    torch.testing.assert_close(shown.z["a.in_proj.v"], functional.linear(kv, w[16:], b[16:]))


def test_parts_of_other_widths_have_weights_of_their_own():
    attention = nn.MultiheadAttention(8, 2, kdim=5, vdim=6, batch_first=True)
    shown = show(
        Free(lambda self, q, k, v: self.a(q, k, v)[0], a=attention),
        batch_of(torch.randn(3, 4, 8), torch.randn(3, 7, 5), torch.randn(3, 7, 6)),
    )
    assert [site.name for site in shown.discovery.sites] == ["a.q_proj", "a.k_proj", "a.v_proj", "a.out_proj"]


@pytest.mark.parametrize("layout", ["three blocks", "interleaved by head"])
def test_fused_projections_are_split_by_where_their_units_go(layout):
    def forward(self, x):
        rows, length, _ = x.shape
        if layout == "three blocks":
            q, k, v = self.qkv(x).reshape(rows, length, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = self.qkv(x).view(rows, length, 2, 12).transpose(1, 2).chunk(3, -1)
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(rows, length, 8)

    model = Free(forward, qkv=linear(8, 24))
    shown = show(model, batch_of(numbers(3, 5, 8)))
    rows = torch.arange(24).view(3, 8) if layout == "three blocks" else torch.arange(24).view(2, 3, 4).transpose(0, 1)
    for index, part in enumerate("qkv"):
        chosen = rows[index].flatten()
        torch.testing.assert_close(shown.site(f"qkv.{part}").pattern_UD, model.qkv.weight[chosen].detach())


@pytest.mark.parametrize("merged", [False, True])
def test_masked_positions_are_no_presentations(merged):
    def forward(self, x, mask):
        h = self.l(x.reshape(-1, 3) if merged else x).relu()
        pooled = (h.view(4, 5, -1) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self.head(pooled)

    model = Free(forward, l=linear(3, 6), head=linear(6, 2))
    x = numbers(4, 5, 3)
    mask = torch.arange(5) < torch.tensor([5, 2, 1, 4])[:, None]
    shown = show(model, batch_of(x, mask, mask_NS=mask))
    torch.testing.assert_close(shown.last["l"].mask_LS, mask)
    assert shown.last["head"].mask_LS is None
    assert shown.site("l").note is None


def test_a_site_of_other_positions_says_that_it_is_not_masked():
    model = Free(lambda self, x: self.c(x.mT).mean(-1), c=nn.Conv1d(3, 4, 3, stride=2, dtype=torch.float64))
    mask = torch.arange(9) < torch.tensor([9, 4])[:, None]
    shown = show(model, batch_of(numbers(2, 9, 3), mask_NS=mask))
    assert shown.last["c"].mask_LS is None
    assert "no position is masked" in shown.site("c").note


def test_lengths_may_change_between_batches():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    found = discover(layer, batch_of(torch.randn(4, 5, 8)))
    for rows, length in ((2, 9), (1, 1), (6, 5)):
        seen = {}
        batch = Batch(inputs=(torch.randn(rows, length, 8),), uid_N=torch.arange(rows))
        tapped_forward(layer, found, batch, lambda p, seen=seen: seen.update({p.site.name: p.z_LSU.shape[:2]}))
        assert set(seen) == {site.name for site in found.sites}
        assert set(seen.values()) == {(rows, length)}


@pytest.mark.parametrize("interleaved", [True, False])
def test_a_fused_projection_whose_queries_are_rotated_in_part(interleaved):
    """Rotary positions: half of each head's queries and keys goes another way; or two heads share keys and values."""

    def rotated(part):
        turned, left = part[..., :2], part[..., 2:]
        return torch.cat([turned * 0.6 + turned.flip(-1) * 0.8, left], -1)

    def forward(self, x):
        if interleaved:
            q, k, v = self.qkv(x).view(*x.shape[:2], 2, 12).transpose(1, 2).chunk(3, -1)
        else:
            q, k, v = self.qkv(x).split([8, 4, 4], -1)
            q, k, v = q.unflatten(2, (2, 4)).transpose(1, 2), k[:, None], v[:, None]
        scores = rotated(q) @ rotated(k).mT
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    model = Free(forward, qkv=linear(8, 24 if interleaved else 16), out=linear(8, 8))
    x = numbers(3, 5, 8)
    shown = show(model, batch_of(x))
    assert [site.name for site in shown.discovery.sites] == ["qkv.q", "qkv.k", "qkv.v", "out"]
    chosen = {
        "q": [*range(4), *range(12, 16)] if interleaved else list(range(8)),
        "k": [*range(4, 8), *range(16, 20)] if interleaved else list(range(8, 12)),
        "v": [*range(8, 12), *range(20, 24)] if interleaved else list(range(12, 16)),
    }
    for part, units in chosen.items():
        torch.testing.assert_close(shown.z[f"qkv.{part}"], model.qkv(x).detach()[..., units])


@pytest.mark.parametrize("made_of", [lambda k: torch.tensor([], dtype=k.dtype), lambda k: k.new_zeros(0)])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_cache_of_keys_that_begins_empty(rows, made_of):
    """Causal models of transformers join their keys to an empty vector, which torch skips whatever the axis."""

    def forward(self, x):
        keys = torch.cat([made_of(x), self.k(x)], dim=-2)
        return self.out((self.q(x) @ keys.mT).softmax(-1) @ keys)

    model = Free(forward, k=linear(8, 8), q=linear(8, 8), out=linear(8, 8))
    x = numbers(rows, 5, 8)
    shown = show(model, batch_of(x))
    assert [site.name for site in shown.discovery.sites] == ["k", "q", "out"]
    for name in ("k", "q"):
        torch.testing.assert_close(shown.z[name], model.get_submodule(name)(x).detach())
    torch.testing.assert_close(shown.z["out"], model(x).detach())
