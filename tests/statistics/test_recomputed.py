"""Whole networks, measured, against every column recomputed from activations that hooks captured.

The networks are chosen to hurt: tied values, dead and always firing units, constant and zero patterns, rows of NaN,
batches of one row, masked tokens, groups, strides and padding, a folded BatchNorm with negative gains, a LayerNorm's
gain, gated pairs, recurrent gates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from pipeline.batch import Batch
from pipeline.flow.discover import discover
from pipeline.flow.tap import tapped_forward
from pipeline.measure import measure
from tests.statistics.recompute.check import check
from tests.statistics.recompute.raw import Raw

CLASSES = 3
SIZES = [20, 1, 17, 1, 22]


@dataclass
class Heard:
    """What hooks heard at one site: tensors of each batch."""

    x: list[torch.Tensor] = field(default_factory=list)
    z: list[torch.Tensor] = field(default_factory=list)
    a: list[torch.Tensor] = field(default_factory=list)


# of each site the modules whose input is x, whose output is z, and whose output is a
Where = Mapping[str, tuple[nn.Module, nn.Module, nn.Module]]


def listen(model: nn.Module, where: Where, batches: Sequence[Batch]) -> dict[str, tuple[list, list, list, list]]:
    """x, z, a and the gradient of the summed losses at a, of every site and batch."""
    heard = {site: Heard() for site in where}
    hooks = []
    for site, (first, affine, gate) in where.items():
        one = heard[site]
        hooks += [
            first.register_forward_pre_hook(lambda _, args, one=one: one.x.append(args[0].detach().clone())),
            affine.register_forward_hook(lambda *given, one=one: one.z.append(given[-1].detach().clone())),
            gate.register_forward_hook(lambda *given, one=one: one.a.append(_kept(given[-1]))),
        ]
    model.eval()
    for batch in batches:
        if batch.label_N is None:
            batch.forward(model)
            continue
        losses = functional.cross_entropy(batch.forward(model), batch.label_N.clamp(min=0), reduction="none")
        losses[batch.label_N >= 0].sum().backward()
    for hook in hooks:
        hook.remove()
    return {site: (one.x, one.z, [a.detach() for a in one.a], [a.grad for a in one.a]) for site, one in heard.items()}


def _kept(a: torch.Tensor) -> torch.Tensor:
    a.retain_grad()
    return a


def batches_of(x: torch.Tensor, label: torch.Tensor, *, mask: torch.Tensor | None = None) -> list[Batch]:
    """Uneven batches, whose rows have names in no order."""
    uid = torch.from_numpy(np.random.default_rng(7).choice(2**62, len(x), replace=False))
    parts = [x.split(SIZES), uid.split(SIZES), label.split(SIZES)]
    if mask is None:
        return [Batch((one,), uids, labels) for one, uids, labels in zip(*parts, strict=True)]
    return [
        Batch((one, real), uids, labels, mask_NS=real)
        for one, uids, labels, real in zip(*parts, mask.split(SIZES), strict=True)
    ]


def together(values: Sequence[torch.Tensor], shape: Callable[[torch.Tensor], torch.Tensor]) -> np.ndarray:
    return torch.cat([shape(value) for value in values]).double().numpy()


def flat(value: torch.Tensor) -> torch.Tensor:
    """(N, U) as (N, 1, U); (N, S, U) as it is; (N, U, H, W) as (N, H·W, U)."""
    return value[:, None] if value.ndim == 2 else value if value.ndim == 3 else value.flatten(2).mT


def raw_of(batches: Sequence[Batch], heard: tuple[list, list, list, list], **fields: Any) -> Raw:
    x, z, a, g = heard
    fields = {"fires": True, "non_negative": False, "classes": CLASSES, **fields}
    if "x" not in fields:
        fields["x"] = together(x, flat)[:, :, None]
    return Raw(
        z=together(z, flat),
        a=together(a, flat),
        gradient=None if any(one is None for one in g) else together(g, flat),
        uid=torch.cat([batch.uid_N for batch in batches]).numpy(),
        label=None if batches[0].label_N is None else torch.cat([batch.label_N for batch in batches]).numpy(),
        **fields,
    )


def weights(layer: nn.Module) -> dict[str, np.ndarray]:
    w = layer.weight.detach().double().flatten(1).numpy()
    return {"w": w, "b": np.zeros(len(w)) if layer.bias is None else layer.bias.detach().double().numpy()}


def labels(random: np.random.Generator, rows: int) -> torch.Tensor:
    """Some unknown, and one class hardly there."""
    return torch.from_numpy(random.choice([-1, 0, 1, 2], rows, p=[0.1, 0.45, 0.4, 0.05]))


def test_a_multilayer_perceptron() -> None:
    torch.manual_seed(0)
    random = np.random.default_rng(0)

    def build() -> nn.Sequential:
        return nn.Sequential(nn.Linear(12, 9), nn.GELU(), nn.Linear(9, 8), nn.ReLU(inplace=True), nn.Linear(8, CLASSES))

    model, twin = build(), build()
    with torch.no_grad():
        # dead; always firing; a constant pattern; no pattern; a near-twin
        model[2].bias[0], model[2].bias[1] = -100, 100
        model[0].weight[2], model[0].weight[3] = 0.5, 0.0
        model[0].weight[4] = 2 * model[0].weight[5]
        model[2].weight[3] = model[2].weight[4]
        model[2].bias[3] = model[2].bias[4]
    x = torch.from_numpy(random.normal(size=(61, 12)) + 0.5).float()
    x[10:20] = x[30:40]  # ties
    x[40:44] = 0
    x[50] = 3  # a constant row has no correlation
    x[55] = torch.nan
    batches = batches_of(x, labels(random, 61))
    tables = measure(model, batches, classes=CLASSES, twin=twin)
    where = {"0": (model[0], model[0], model[1]), "2": (model[2], model[2], model[3]), "4": (model[4],) * 3}
    heard = listen(model, where, batches)
    for site, fields in {
        "0": {},
        "2": {"non_negative": True},
        "4": {"fires": False},
    }.items():
        number = int(site)
        raw = raw_of(batches, heard[site], **weights(model[number]), **fields, twin_w=weights(twin[number])["w"])
        check(raw, tables, site)


def windows(x: torch.Tensor, conv: nn.Conv2d) -> torch.Tensor:
    """The patch that each output of a convolution meets, (N, S, G, D), cut out one by one."""
    (kh, kw), (sh, sw), (ph, pw) = conv.kernel_size, conv.stride, conv.padding
    padded = functional.pad(x, (pw, pw, ph, ph))
    high, wide = (padded.shape[2] - kh) // sh + 1, (padded.shape[3] - kw) // sw + 1
    cut = [
        padded[:, :, i * sh : i * sh + kh, j * sw : j * sw + kw].reshape(len(x), conv.groups, -1)
        for i in range(high)
        for j in range(wide)
    ]
    return torch.stack(cut, 1)


def folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> dict[str, np.ndarray]:
    """The pattern behind which a BatchNorm in eval mode disappears."""
    found = weights(conv)
    gain = (norm.weight / (norm.running_var.double() + norm.eps).sqrt()).detach().double().numpy()
    mean, shift = norm.running_mean.double().numpy(), norm.bias.detach().double().numpy()
    return {"w": found["w"] * gain[:, None], "b": shift + (found["b"] - mean) * gain, "raw_w": found["w"]}


def test_a_convolutional_network() -> None:
    torch.manual_seed(1)
    random = np.random.default_rng(1)
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True),
        nn.Conv2d(6, 5, (3, 2), padding=(1, 0)), nn.BatchNorm2d(5), nn.Sigmoid(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(5 * 2, CLASSES),
    )  # fmt: skip
    with torch.no_grad():
        for norm in (model[1], model[4]):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.3, 2)
            norm.weight.normal_()
            norm.bias.normal_()
        model[1].bias[0] = -50
    x = torch.from_numpy(random.normal(size=(61, 4, 8, 7))).float()
    x[:9] = x[20:29]
    x[3, :, :4] = 0
    x[11, 0, 2, 2] = torch.nan  # spoils one group's patches around it
    batches = batches_of(x, labels(random, 61))
    tables = measure(model, batches, classes=CLASSES)
    where = {
        "0": (model[0], model[1], model[2]),
        "3": (model[3], model[4], model[5]),
        "8": (model[8], model[8], model[8]),
    }
    heard = listen(model, where, batches)
    for site, conv, norm, inputs in (("0", model[0], model[1], 18), ("3", model[3], model[4], 36)):
        size = conv.kernel_size[0] * conv.kernel_size[1]
        raw = raw_of(
            batches, heard[site], **folded(conv, norm), non_negative=True,
            x=together(heard[site][0], lambda value, conv=conv: windows(value, conv)),
            contributors=lambda unit, d, conv=conv, size=size: (
                unit // (conv.out_channels // conv.groups) * (conv.in_channels // conv.groups) + d // size
            ),
        )  # fmt: skip
        assert raw.x.shape[-1] == inputs
        check(raw, tables, site)
    raw = raw_of(batches, heard["8"], **weights(model[8]), fires=False)
    check(raw, tables, "8")


class Transformer(nn.Module):
    """One block, its norms first, and a mean over the tokens that are there."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, activation=nn.GELU(), norm_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, token: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        h = self.block(self.embed(token), src_key_padding_mask=~mask)
        return self.head((h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def test_a_transformer_with_masked_tokens() -> None:
    torch.manual_seed(2)
    random = np.random.default_rng(2)
    model = Transformer()
    with torch.no_grad():
        model.block.norm2.weight.normal_()
        model.block.norm2.bias.normal_()
    token = torch.from_numpy(random.integers(0, 11, (61, 6)))
    mask = torch.arange(6)[None] < torch.from_numpy(random.integers(1, 7, (61, 1)))
    token[5:9] = token[25:29]
    mask[5:9] = mask[25:29]
    batches = batches_of(token, labels(random, 61), mask=mask)
    tables = measure(model, batches, classes=CLASSES)
    block = model.block
    where = {
        "block.linear1": (block.norm2, block.linear1, block.activation),
        "block.linear2": (block.linear2, block.linear2, block.linear2),
        "head": (model.head,) * 3,
    }
    heard = listen(model, where, batches)
    gain, shift = (value.detach().double() for value in (block.norm2.weight, block.norm2.bias))
    w = block.linear1.weight.detach().double()
    normed = together(heard["block.linear1"][0], lambda value: functional.layer_norm(value, (8,), eps=block.norm2.eps))
    raw = raw_of(
        batches, heard["block.linear1"], x=normed[:, :, None], mask=mask.numpy(), w=(w * gain).numpy(),
        b=(block.linear1.bias.detach().double() + w @ shift).numpy(), raw_w=w.numpy(),
    )  # fmt: skip
    check(raw, tables, "block.linear1")
    raw = raw_of(batches, heard["block.linear2"], **weights(block.linear2), mask=mask.numpy(), fires=False)
    check(raw, tables, "block.linear2")
    check(raw_of(batches, heard["head"], **weights(model.head), fires=False), tables, "head")


class Tagger(nn.Module):
    """A class for every token, and one number for the text."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.up, self.act, self.tags = nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, CLASSES)
        self.pooled, self.tanh = nn.Linear(6, 2), nn.Tanh()

    def forward(self, token: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.act(self.up(self.embed(token)))
        return self.tags(h), self.tanh(self.pooled((h * mask[..., None]).sum(1)))


def test_a_tagger_of_tokens() -> None:
    torch.manual_seed(5)
    random = np.random.default_rng(5)
    model = Tagger()
    token = torch.from_numpy(random.integers(0, 11, (61, 6)))
    mask = torch.arange(6)[None] < torch.from_numpy(random.integers(1, 7, (61, 1)))
    tag = labels(random, 61 * 6).view(61, 6)
    batches = [
        replace(batch, label_N=None, label_NS=tags)
        for batch, tags in zip(batches_of(token, tag[:, 0], mask=mask), tag.split(SIZES), strict=True)
    ]
    tables = measure(model, batches, classes=CLASSES)
    where = {"up": (model.up, model.up, model.act), "tags": (model.tags,) * 3}
    heard = listen(model, {**where, "pooled": (model.pooled, model.pooled, model.tanh)}, batches)
    at = {"label_at": tag.numpy(), "mask": mask.numpy()}
    check(raw_of(batches, heard["up"], **weights(model.up), **at, non_negative=True), tables, "up")
    check(raw_of(batches, heard["tags"], **weights(model.tags), **at, fires=False), tables, "tags")
    # one position for six labels: not the labels' own
    check(raw_of(batches, heard["pooled"], **weights(model.pooled)), tables, "pooled")


def test_a_class_for_every_pixel() -> None:
    torch.manual_seed(6)
    random = np.random.default_rng(6)
    model = nn.Sequential(
        nn.Conv2d(1, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 4, 3, padding=1, stride=2), nn.Sigmoid()
    )
    x = torch.from_numpy(random.normal(size=(61, 1, 4, 6))).float()
    pixel = labels(random, 61 * 24).view(61, 4, 6)
    tables = measure(model, list(zip(x.split(SIZES), pixel.split(SIZES), strict=True)), classes=CLASSES)
    rows = torch.arange(61).split(SIZES)
    batches = [Batch((one,), uids) for one, uids in zip(x.split(SIZES), rows, strict=True)]
    heard = listen(model, {"0": (model[0], model[0], model[1]), "2": (model[2], model[2], model[3])}, batches)
    for site, more in {"0": {"label_at": pixel.flatten(1).numpy()}, "2": {}}.items():
        conv = model[int(site)]
        size = together(heard[site][0], lambda value, conv=conv: windows(value, conv))
        raw = raw_of(batches, heard[site], **weights(conv), **more, x=size, non_negative=True,
                     contributors=lambda unit, d: d // 9)  # fmt: skip
        check(raw, tables, site)


class Gated(nn.Module):
    """A gated pair: silu(gate) × up."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.silu, self.product = nn.Linear(7, 9), nn.Linear(7, 9), nn.SiLU(), nn.Identity()
        self.down = nn.Linear(9, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.product(self.silu(self.gate(x)) * self.up(x)))


def test_a_gated_pair() -> None:
    torch.manual_seed(3)
    random = np.random.default_rng(3)
    model = Gated()
    x = torch.from_numpy(random.normal(size=(61, 7))).float()
    x[4:9] = x[14:19]
    batches = batches_of(x, labels(random, 61))
    tables = measure(model, batches, classes=CLASSES)
    heard = listen(model, {"gate": (model.gate, model.gate, model.product), "down": (model.down,) * 3}, batches)
    check(raw_of(batches, heard["gate"], **weights(model.gate), up_w=weights(model.up)["w"]), tables, "gate")
    check(raw_of(batches, heard["down"], **weights(model.down), fires=False), tables, "down")


class Recurrent(nn.Module):
    """An LSTM read at its last step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 5, batch_first=True)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def test_a_recurrent_network() -> None:
    torch.manual_seed(4)
    random = np.random.default_rng(4)
    model = Recurrent()
    x = torch.from_numpy(random.normal(size=(61, 6, 4))).float()
    batches = batches_of(x, labels(random, 61))
    tables = measure(model, batches, classes=CLASSES)
    shown: dict[str, list] = {}
    for batch in batches:
        tapped_forward(
            model, discover(model, batches[0]), batch, lambda one: shown.setdefault(one.site.name, []).append(one)
        )
    lstm = model.lstm
    with torch.no_grad():
        h = torch.cat([torch.zeros(61, 1, 5), lstm(x)[0][:, :-1]], 1)
    met = torch.cat([x, h], 2).double().numpy()
    w = torch.cat([lstm.weight_ih_l0, lstm.weight_hh_l0], 1).detach().double().numpy()
    b = (lstm.bias_ih_l0.detach().double() + lstm.bias_hh_l0.detach().double()).numpy()
    for place, name in enumerate("ifgo"):
        rows = slice(5 * place, 5 * place + 5)
        z = torch.cat([one.z_LSU for one in shown[f"lstm.l0.{name}"]])
        a = torch.cat([one.a_LSU for one in shown[f"lstm.l0.{name}"]])
        # a fused cell shows no z of its own: the program's must be w·x + b, and its bits are then what is counted
        np.testing.assert_allclose(z, met @ w[rows].T + b[rows], atol=1e-5)
        np.testing.assert_allclose(a, torch.tanh(z) if name == "g" else torch.sigmoid(z), atol=1e-6)
        raw = raw_of(batches, ([], [z], [a], [None]), x=met[:, :, None], w=w[rows], b=b[rows], non_negative=name != "g")
        check(raw, tables, f"lstm.l0.{name}")
