"""Batches shown by CUDA graphs leave the states that batches shown launch by launch do, to the last bit.

`pytest -m gpu` on a machine with a GPU; elsewhere all of it is skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from pipeline import graphs
from pipeline.batch import Batch
from pipeline.devices import GPU, device_named, moved
from pipeline.errors import ModelError
from pipeline.flow.discover import discover
from pipeline.job_sections import Numerics
from pipeline.kernels import choose, triton_build
from pipeline.kernels.accumulate import Bounded
from pipeline.numerics import in_force
from pipeline.registry import families, statistics
from pipeline.resolve import sampled
from pipeline.running import Running, States
from pipeline.statistics.base import Statistic
from tests.models.build import EXAMPLES, build, disturbed, forward_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
    pytest.mark.skipif(triton_build.lacking() is not None, reason="Triton cannot be used"),
]
NAMES = ("response", "labels", "exemplars", "match")
# whose forwards follow no script: of a graph, and where a factorisation machine is
WITHOUT = {"gcn", "deepfm"}


def named(*names: str) -> list[Statistic]:
    return [statistics()[name] for name in names]


def model_of(family: str, dtype: torch.dtype) -> nn.Module:
    example = EXAMPLES[family]
    return disturbed(build(family, example.task, **example.hyperparameters)).to(GPU, dtype)


def batches_of(family: str, dtype: torch.dtype, number: int = 9) -> list[Batch]:
    """The last one of fewer rows."""
    made = []
    for index in range(number):
        inputs = forward_inputs(family, rows=40 if index < number - 1 else 17, seed=index)
        uid_N = torch.arange(len(inputs[0])) + index * 1000
        made.append(moved(Batch(inputs, uid_N, uid_N % 2), device_named(GPU), dtype))
    return made


def shown(
    model: nn.Module, batches: Sequence[Batch], chosen: Sequence[Statistic] | None = None
) -> tuple[States, list[Any], Running]:
    with in_force(Numerics()):
        running = Running(discover(model, batches[0]), named(*NAMES) if chosen is None else chosen, 2, choose.name(GPU))
        outs = [running.add(model, batch) for batch in batches]
        running.finish(model)
    return running.states(), outs, running


def assert_same_bits(mine: States, yours: States) -> None:
    assert mine.keys() == yours.keys()
    for name, sites in mine.items():
        for site, state in sites.items():
            for part, value in state.items():
                other = yours[name][site][part]
                equal = (value == other) | ((value != value) & (other != other))
                assert bool(equal.all()), f"{name} of {site} {part}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", sorted(families()))
def test_a_graph_leaves_the_bits_that_launches_do(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = model_of(family, dtype), batches_of(family, dtype)
    mine, outs, running = shown(model, batches)
    assert running._graphs.number == (0 if family in WITHOUT else 1), running.remarks()
    if family in WITHOUT:
        return
    assert running.remarks() == []
    monkeypatch.setattr(graphs, "WARM", len(batches))
    yours, expected, launched = shown(model, batches)
    assert launched._graphs.number == 0
    assert_same_bits(mine, yours)
    for out, other in zip(outs, expected, strict=True):
        assert torch.equal(out, other)


def test_samples_are_shown_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = model_of("resnet", torch.float32), batches_of("resnet", torch.float32)
    chosen = [sampled(one, 1_000_000) for one in statistics().values()]
    mine, _, running = shown(model, batches, chosen)
    assert running._graphs.number == 1
    monkeypatch.setattr(graphs, "WARM", len(batches))
    yours, _, _ = shown(model, batches, chosen)
    assert_same_bits(mine, yours)
    assert all(int(state["comoment.n_U"].max()) > 0 for state in mine["template"].values())


def test_a_model_that_counts_its_calls_is_run_each_time() -> None:
    class Noting(nn.Linear):
        def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
            self.calls = getattr(self, "calls", 0) + 1
            return super().forward(x_ND)

    model = nn.Sequential(Noting(3, 2)).to(GPU)
    batches = [moved(Batch((torch.ones(4, 3),), torch.arange(4)), device_named(GPU)) for _ in range(9)]
    with in_force(Numerics()):
        running = Running(discover(model, batches[0]), named("response"), 0, choose.name(GPU))
        before = getattr(model[0], "calls", 0)
        for batch in batches:
            running.add(model, batch)
    assert running._graphs.number == 0
    assert model[0].calls - before == len(batches)


def test_a_model_that_waits_for_its_data_is_shown_launch_by_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
            return self.layer(x_ND) if bool((x_ND > 0).any()) else self.layer(-x_ND)

    monkeypatch.setattr(graphs, "_KNOWN", (*graphs._KNOWN, __name__))
    model = Asking().to(GPU)
    batches = [
        moved(Batch((torch.randn(4, 3),), torch.arange(4) + 10 * number), device_named(GPU)) for number in range(9)
    ]
    mine, outs, running = shown(model, batches, named("response", "match"))
    assert running._graphs.number == 0
    assert [remark for remark in running.remarks() if "no CUDA graph" in remark]
    monkeypatch.setattr(graphs, "WARM", len(batches))
    yours, expected, _ = shown(model, batches, named("response", "match"))
    assert_same_bits(mine, yours)
    for out, other in zip(outs, expected, strict=True):
        assert torch.equal(out, other)


def test_weights_that_move_are_seen() -> None:
    model, batches = model_of("mlp", torch.float32), batches_of("mlp", torch.float32)
    with in_force(Numerics()):
        running = Running(discover(model, batches[0]), named("response"), 0, choose.name(GPU))
        for batch in batches[:7]:
            running.add(model, batch)
        assert running._graphs.number == 1
        weight = next(model.parameters())
        weight.data = weight.data * 2
        out = running.add(model, batches[7])
        with torch.no_grad():
            torch.testing.assert_close(out, model.eval()(*batches[7].inputs))


def test_counts_begin_anew_before_they_could_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of two sizes of batches leaves no room: the graph of the other one does not add to what is gone."""
    monkeypatch.setattr(choose, "Bounded", partial(Bounded, most=40 * 12))
    model, whole = model_of("mlp", torch.float32), batches_of("mlp", torch.float32, 41)[:-1]
    batches = [batch if number % 2 else first_rows(batch, 17) for number, batch in enumerate(whole)]
    mine, _, running = shown(model, batches, named("response"))
    assert running._graphs.number > 0
    assert all(sums._fused._before is not None for sums in running._sums.values())
    monkeypatch.setattr(graphs, "WARM", len(batches))
    yours, _, launched = shown(model, batches, named("response"))
    assert launched._graphs.number == 0
    assert_same_bits(mine, yours)


def first_rows(batch: Batch, rows: int) -> Batch:
    assert batch.label_N is not None
    inputs = tuple(one[:rows].clone() for one in batch.inputs)
    return replace(batch, inputs=inputs, uid_N=batch.uid_N[:rows].clone(), label_N=batch.label_N[:rows].clone())


def test_a_weight_changed_by_the_user_is_refused_as_without() -> None:
    model, batches = model_of("mlp", torch.float32), batches_of("mlp", torch.float32)
    with in_force(Numerics()):
        running = Running(discover(model, batches[0]), named("response"), 0, choose.name(GPU))
        for batch in batches[:7]:
            running.add(model, batch)
        with torch.no_grad():
            next(model.parameters()).mul_(2)
        with pytest.raises(ModelError, match="was changed while"):
            running.finish(model)
