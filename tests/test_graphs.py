"""Which models and states a CUDA graph may be captured of, and what accumulators say of it. No GPU is needed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from pipeline.batch import Batch
from pipeline.flow.discover import discover
from pipeline.graphs import Graphs, Shown, keeps_nothing
from pipeline.kernels import choose
from pipeline.kernels.accumulate import Accumulator, Bounded
from pipeline.kernels.base import Primitive, State
from pipeline.registry import families, statistics
from pipeline.running import Running
from pipeline.sites import Presentations
from tests.laws.drawn import Recipe, draw
from tests.models.build import EXAMPLES, build


class Counting(nn.Module):
    """Decides by what it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.calls = 0

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.layer(x_ND) * self.calls


class Within(Accumulator):
    """Shown numbers, of which it can take any."""

    room = 1 << 40

    def add(self, presentations: Presentations) -> None:
        pass

    def states(self) -> dict[Primitive, State]:
        return {}


@pytest.mark.parametrize("family", sorted(families()))
def test_models_of_families_keep_nothing(family: str) -> None:
    example = EXAMPLES[family]
    assert keeps_nothing(build(family, example.task, **example.hyperparameters))


def layer_of(model: nn.Module) -> nn.Linear:
    return next(module for module in model.modules() if isinstance(module, nn.Linear))


def hooked(model: nn.Module) -> None:
    layer_of(model).register_forward_hook(lambda *given: None)


def hooked_before(model: nn.Module) -> None:
    layer_of(model).register_forward_pre_hook(lambda *given: None)


def replaced(model: nn.Module) -> None:
    layer = layer_of(model)
    layer.forward = lambda x: nn.Linear.forward(layer, x)  # type: ignore[method-assign]


def with_another(model: nn.Module) -> None:
    model.another = Counting()


def parametrized(model: nn.Module) -> None:
    class Changed(nn.Linear):
        pass

    model.another = torch.nn.utils.parametrizations.weight_norm(Changed(3, 3))


@pytest.mark.parametrize("change", [hooked, hooked_before, replaced, with_another, parametrized])
def test_a_model_that_could_do_otherwise_next_time_is_not_taken(change: Callable[[nn.Module], None]) -> None:
    model = build("mlp", EXAMPLES["mlp"].task, **EXAMPLES["mlp"].hyperparameters)
    assert keeps_nothing(model)
    change(model)
    assert not keeps_nothing(model)


def test_counts_of_32_bits_leave_room_for_so_many_presentations_and_no_more() -> None:
    bounded = Bounded(Within, most=100)
    shown = draw(Recipe(1, rows=6, positions=5))
    bounded.add(shown)
    assert bounded.room == 100 - 30
    bounded.count(60)
    assert bounded.room == 10
    # begun anew
    bounded.add(shown)
    assert bounded.room == 100 - 30


@pytest.mark.parametrize(
    ("kernel", "has_room"), [(choose.REFERENCE, False), (choose.NATIVE, False), (choose.TRITON, True)]
)
def test_only_the_kernel_for_gpus_can_be_done_again(kernel: str, has_room: bool) -> None:
    if kernel == choose.TRITON:
        pytest.importorskip("triton", reason="Triton is not installed")
    site = draw(Recipe(1, rows=4, units=3)).site
    known = statistics()
    plain = [
        one for name in ("response", "labels", "exemplars", "match") for one in known[name].primitives(site).values()
    ]
    assert (choose.accumulator(kernel, site, plain).room > 0) == has_room
    others = [*plain, *known["template"].primitives(site).values()]
    assert choose.accumulator(kernel, site, others).room == 0


@pytest.mark.parametrize(("name", "adds"), [("response", True), ("importance", False)])
def test_running_states_say_what_a_batch_added_to(name: str, adds: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    batch = Batch((torch.randn(5, 3),), torch.arange(5), torch.arange(5) % 2)
    running = Running(discover(model, batch), [statistics()[name]], 2)
    shown = [running._shown(model, running.statistics, batch) for _ in range(3)]
    for out, added, _ in shown:
        torch.testing.assert_close(out, model(batch.inputs[0]))
        assert (added is not None) == adds
        if added is not None:
            assert sorted(added.values()) == [5, 5]
    # by a tap, recorded, and as it was recorded
    assert [script is not None for _, _, script in shown] == [False, False, True]


def test_on_a_cpu_every_batch_is_shown() -> None:
    graphs, seen = Graphs(), []

    def show(batch: Batch) -> Shown:
        seen.append(batch)
        return Shown(len(seen), {Within(): 1}, None)

    batch = Batch((torch.randn(5, 3),), torch.arange(5))
    assert [graphs.show(nn.Linear(3, 2), batch, 0, show) for _ in range(9)] == list(range(1, 10))
    assert graphs.number == 0
