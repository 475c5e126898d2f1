"""Mixtures of experts: a site for each expert's weights, shown the rows that are sent to it, in a loop or at once."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from pipeline.flow.discover import discover
from pipeline.flow.tap import tapped_forward
from pipeline.measure import measure
from pipeline.registry import statistics
from tests.flow.models import Free, linear, weight
from tests.flow.shown import batch_of, show

EXPERTS = 3


def mixture(form: str) -> Free:
    def forward(self, x):
        tokens = x.flatten(0, 1)
        share, chosen = self.route(tokens).softmax(-1).topk(2, -1)
        order = chosen.flatten().argsort(stable=True)
        token, expert = order // 2, chosen.flatten()[order]
        ends = torch.bincount(expert, minlength=EXPERTS).cumsum(0)
        if form == "at once":
            ends = ends.to(torch.int32)
            gate, up = functional.grouped_mm(tokens[token], self.enter, offs=ends).chunk(2, -1)
            out = functional.grouped_mm(functional.silu(gate) * up, self.leave, offs=ends)
        else:
            parts = []
            for number, (start, end) in enumerate(zip([0, *ends.tolist()], ends.tolist(), strict=False)):
                gate, up = (tokens[token[start:end]] @ self.enter[number]).chunk(2, -1)
                parts.append((functional.silu(gate) * up) @ self.leave[number])
            out = torch.cat(parts)
        sent = out * share.flatten()[order][:, None]
        return torch.zeros_like(tokens).index_add(0, token, sent).view_as(x)

    route = linear(8, EXPERTS).float()
    enter, leave = weight(EXPERTS, 8, 32, dtype=torch.float32), weight(EXPERTS, 16, 8, dtype=torch.float32)
    return Free(forward, route=route, enter=enter, leave=leave)


@pytest.mark.parametrize("form", ["in a loop", "at once"])
def test_every_expert_is_a_site_with_the_tokens_sent_to_it(form):
    model, x = mixture(form), torch.randn(4, 5, 8)
    shown = show(model, batch_of(x))
    assert [(site.name, site.gate, site.units) for site in shown.discovery.sites][1:] == (
        [(f"enter.{expert}", "swiglu", 16) for expert in range(EXPERTS)]
        + [(f"leave.{expert}", "identity", 8) for expert in range(EXPERTS)]
        if form == "at once"
        else [
            named
            for expert in range(EXPERTS)
            for named in ((f"enter.{expert}", "swiglu", 16), (f"leave.{expert}", "identity", 8))
        ]
    )
    chosen = model.route(x).topk(2, -1).indices
    for expert in range(EXPERTS):
        sent = (chosen == expert).any(-1)
        assert shown.last[f"enter.{expert}"].row_index_L.bincount(minlength=4).tolist() == sent.sum(1).tolist()
        inner = (x[sent] @ model.enter[expert]).detach()
        torch.testing.assert_close(shown.z[f"enter.{expert}"][:, 0], inner[:, :16])
        expected = functional.silu(inner[:, :16]) * inner[:, 16:]
        torch.testing.assert_close(shown.x[f"leave.{expert}"][:, 0, 0], expected)
        space = shown.site(f"leave.{expert}").inputs
        assert (space.upstream, space.upstream_unit) == ((f"enter.{expert}",), tuple((0, unit) for unit in range(16)))
    torch.testing.assert_close(shown.out, model(x))
    assert shown.discovery.unread == ()


def test_experts_that_a_batch_does_not_reach_are_shown_nothing():
    model, x = mixture("at once"), torch.randn(4, 5, 8)
    found = discover(model, batch_of(x))
    with torch.no_grad():
        model.route.bias[2] = -1e4
    seen = {}
    tapped_forward(model, found, batch_of(x), lambda p: seen.update({p.site.name: p.z_LSU[..., 0].numel()}))
    assert (seen["enter.2"], seen["enter.0"] + seen["enter.1"]) == (0, 40)
    unreached = show(model, batch_of(x)).site("enter.2")
    assert (unreached.gate, unreached.units) == ("identity", 32)
    assert "shows it nothing" in unreached.note


@pytest.mark.parametrize("form", ["added", "added as it is", "put"])
def test_an_expert_that_the_first_batch_does_not_reach_is_read_off_a_later_one(form):
    def forward(self, x):
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            at = (x[:, 0] == number).nonzero()[:, 0]
            made = expert(x[at])
            if form == "put":
                out[at] = made.relu() * self.share(x[at]).sigmoid()
            else:
                out.index_add_(0, at, made.relu() if form == "added" else made)
        return out

    experts = torch.nn.ModuleList([torch.nn.Linear(6, 6) for _ in range(EXPERTS)])
    model = Free(forward, experts=experts, share=torch.nn.Linear(6, 1))
    batches = [torch.rand(8, 6), torch.rand(9, 6)]
    for number, x in enumerate(batches):
        x[:, 0] = torch.arange(len(x)) % (number + 2)
    gates = {f"experts.{number}": "identity" if form == "added as it is" else "relu" for number in range(EXPERTS)}
    first = discover(model, batch_of(batches[0]))
    assert "experts.2" in first.unshown
    found = measure(model, batches, statistics=[statistics()["response"]])["sites"].to_pylist()
    assert {site["site"]: site["gate"] for site in found if "experts" in site["site"]} == gates
    assert all(site["reason"] is None for site in found if "experts" in site["site"])
