"""Which models and states a CUDA graph may be captured of, and what accumulators say of it. No GPU is needed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import pipeline.graphs as graphs_module
from pipeline.batch import Batch
from pipeline.flow.discover import discover
from pipeline.flow.script import Script
from pipeline.graphs import Graphs, Show, Shown, keeps_nothing
from pipeline.kernels import choose
from pipeline.kernels.accumulate import Accumulator, Bounded
from pipeline.kernels.base import Primitive, State
from pipeline.kernels.counts import LARGEST
from pipeline.registry import families, statistics
from pipeline.resolve import sampled
from pipeline.running import Running
from pipeline.sites import Presentations
from tests.laws.drawn import Recipe, draw
from tests.models.build import EXAMPLES, build

SCRIPT = Script((), 0, 0, ())


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


def of_a_name_like_torchs(model: nn.Module) -> None:
    def act(x: torch.Tensor) -> torch.Tensor:
        return x

    act.__module__ = "torch_utils"
    model.act = act


def held_in_a_list(model: nn.Module) -> None:
    model.stages = {"first": [nn.functional.relu, lambda x: x]}


def of_another_class(model: nn.Module) -> None:
    class Watched(nn.Parameter):
        pass

    layer = layer_of(model)
    layer.weight = Watched(layer.weight.detach())


@pytest.mark.parametrize(
    "change",
    [
        hooked,
        hooked_before,
        replaced,
        with_another,
        parametrized,
        of_a_name_like_torchs,
        held_in_a_list,
        of_another_class,
    ],
)
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
    begun = bounded.begun
    bounded.add(shown)
    assert bounded.room == 100 - 30
    assert bounded.begun != begun


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
    if has_room:
        grown = choose.accumulator(kernel, site, plain)
        grown.count(5)
        assert grown.room == LARGEST - 5
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


def test_positions_with_labels_of_their_own_cannot_be_done_again() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    shown = draw(Recipe(1, rows=2, positions=2, units=2))
    shown = replace(shown, label_LS=torch.zeros(shown.z_LSU.shape[:2], dtype=torch.int64), classes=2)
    grown = choose.accumulator(choose.TRITON, shown.site, list(statistics()["labels"].primitives(shown.site).values()))
    assert grown.room > 0
    grown.add(shown)
    assert grown.room == 0


@pytest.mark.parametrize("rows", [{"*": 0.5}, {}])
@pytest.mark.parametrize("data_rows", [10, 1_000_000])
def test_which_rows_a_site_takes_is_for_their_uids_to_say(rows: dict[str, float], data_rows: int) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    batch = Batch((torch.randn(5, 3),), torch.arange(5))
    chosen = [sampled(statistics()["template"], data_rows)]
    running = Running(discover(model, batch, rows=rows), chosen)
    assert (running._shown(model, chosen, batch).added is None) == (bool(rows) or chosen[0].sample_shift > 0)


def test_on_a_cpu_every_batch_is_shown() -> None:
    graphs, seen = Graphs(), []

    def show(batch: Batch) -> Shown:
        seen.append(batch)
        return Shown(len(seen), {Within(): 1}, SCRIPT)

    batch = Batch((torch.randn(5, 3),), torch.arange(5))
    assert [graphs.show(nn.Linear(3, 2), batch, 0, show) for _ in range(9)] == list(range(1, 10))
    assert graphs.number == 0


class DoneAgain(graphs_module._Graph):
    """Does again what was shown, without a GPU: with whatever it holds of the batch."""

    def _captured(self, show: Show) -> Shown:
        self._show = show
        return show(self._batch)

    def launch(self) -> Any:
        return self._show(self._batch).out


@pytest.fixture
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is taken and what is copied, as on a GPU."""
    for name, value in {
        "GPU": "cpu",
        "_Graph": DoneAgain,
        "_has_memory": lambda device: True,
        "_watched": lambda show, batch: (show(batch), ""),
    }.items():
        monkeypatch.setattr(graphs_module, name, value)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())


def batch_of(rows: int, number: int, **changed: Any) -> Batch:
    generator = torch.Generator().manual_seed(number)
    x_ND = torch.randn(rows, 3, generator=generator)
    label_NS = torch.randint(9, (rows, 2), generator=generator)
    whole = Batch((x_ND,), torch.arange(rows) + 100 * number, label_NS[:, 0].clone(), label_NS=label_NS)
    return replace(whole, **{"kwargs": {"mask": x_ND > 0}, "mask_NS": x_ND > 0, **changed})


def all_of(batch: Batch) -> float:
    """A number that every tensor of the batch has a part in."""
    parts = [*batch.inputs, *batch.kwargs.values(), batch.mask_NS, batch.uid_N, batch.label_N, batch.label_NS]
    return sum(float(part.double().sin().sum()) * (place + 1) for place, part in enumerate(parts))


def shown_by(accumulators: Sequence[Accumulator], kind: int = 0) -> Show:
    def show(batch: Batch) -> Shown:
        return Shown(all_of(batch) + kind, dict.fromkeys(accumulators, batch.rows), SCRIPT)

    return show


@pytest.mark.usefixtures("without_a_gpu")
def test_every_batch_is_done_with_its_own_numbers_by_the_graph_of_its_kind_and_form() -> None:
    model, made, batches = nn.Linear(3, 2), Graphs(), []
    for number in range(24):
        batch = batch_of((4, 6)[number % 2], number)
        kind = number // 2 % 2
        out = made.show(model, batch, kind, shown_by([Within()], kind))
        assert out == all_of(batch) + kind
        batches.append((batch, all_of(batch)))
    assert made.number == 4
    assert all(all_of(batch) == before for batch, before in batches)


@pytest.mark.usefixtures("without_a_gpu")
@pytest.mark.parametrize(
    "other",
    [
        {"uid_N": torch.arange(4, dtype=torch.int32)},
        {"label_N": torch.arange(4, dtype=torch.int32)},
        {"inputs": (torch.randn(4, 3, dtype=torch.float64),)},
        {"inputs": (torch.randn(4, 1).expand(4, 3),)},
        {"inputs": (torch.randn(5, 3)[1:],)},
        {"call": lambda model, batch: None},
    ],
)
def test_a_batch_of_another_form_is_not_for_the_graph(other: dict[str, Any]) -> None:
    model, made, show = nn.Linear(3, 2), Graphs(), shown_by([Within()])
    for number in range(5):
        made.show(model, batch_of(4, number), 0, show)
    assert made.number == 1
    odd = batch_of(4, 9, **other)
    assert made.show(model, odd, 0, show) == all_of(odd)
    (graph,) = made._graphs.values()
    assert all_of(graph._batch) != all_of(odd)


@pytest.mark.usefixtures("without_a_gpu")
def test_there_is_no_graph_of_batches_that_a_copy_would_lay_out_otherwise() -> None:
    model, made, show = nn.Linear(3, 2), Graphs(), shown_by([Within()])
    for number in range(6):
        batch = batch_of(4, number, inputs=(torch.full((4, 1), float(number)).expand(4, 3),))
        assert made.show(model, batch, 0, show) == all_of(batch)
    assert (made.number, made.remarks) == (0, [])


@pytest.mark.usefixtures("without_a_gpu")
def test_a_graph_does_not_outlive_what_it_adds_to() -> None:
    model, made = nn.Linear(3, 2), Graphs()
    bounded = Bounded(Within, most=100)
    shown, show = draw(Recipe(1, rows=10, positions=4)), shown_by([bounded])
    for number in range(5):
        made.show(model, batch_of(4, number), 0, show)
    (graph,) = made._graphs.values()
    assert bounded.room == 100 - 2 * 4
    # batches of another kind leave little room, and begin anew
    for room in (52, 12):
        bounded.add(shown)
        assert bounded.room == room
        assert graph.fits(model)
    bounded.add(shown)
    assert bounded.room == 60
    assert not graph.fits(model)
    made.show(model, batch_of(4, 9), 0, show)
    assert made.number == 0


@pytest.mark.usefixtures("without_a_gpu")
def test_nothing_is_captured_where_there_is_no_room_by_now() -> None:
    model, made = nn.Linear(3, 2), Graphs()
    bounded = Bounded(Within, most=40)
    show = shown_by([bounded])
    for number in range(2):
        made.show(model, batch_of(4, number), 0, show)
    bounded.count(38)
    made.show(model, batch_of(4, 3), 0, show)
    assert made.number == 0


@pytest.mark.usefixtures("without_a_gpu")
@pytest.mark.parametrize("of", ["capture", "memory"])
def test_where_no_graph_can_be_made_every_batch_is_shown(monkeypatch: pytest.MonkeyPatch, of: str) -> None:
    def fails(self: Any, show: Show) -> Shown:
        show(self._batch)
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    if of == "capture":
        monkeypatch.setattr(DoneAgain, "_captured", fails)
    else:
        monkeypatch.setattr(graphs_module, "_has_memory", lambda device: False)
    model, made, show = nn.Linear(3, 2), Graphs(), shown_by([Within()])
    for number in range(8):
        batch = batch_of(4, number)
        assert made.show(model, batch, 0, show) == all_of(batch)
    assert made.number == 0
    # it is tried once, and said once
    assert [remark.endswith(": operation not permitted") for remark in made.remarks] == [True] * (of == "capture")


def moved(model: nn.Module) -> None:
    model[0].weight.data = model[0].weight.data.clone()


def another(model: nn.Module) -> None:
    model[1].running_mean = torch.ones(2)


def called(model: nn.Module) -> None:
    model[1].forward = lambda x: x


def exchanged(model: nn.Module) -> None:
    model[0] = nn.Linear(3, 2)


@pytest.mark.usefixtures("without_a_gpu")
@pytest.mark.parametrize(
    "change", [moved, another, called, exchanged, lambda model: model[0].register_forward_hook(print)]
)
def test_a_graph_is_of_the_model_as_it_was(change: Callable[[nn.Module], None]) -> None:
    model, made, show = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), Graphs(), shown_by([Within()])
    for number in range(5):
        made.show(model, batch_of(4, number), 0, show)
    (graph,) = made._graphs.values()
    assert graph.fits(model)
    assert not graph.fits(nn.Sequential(*model))
    change(model)
    assert not graph.fits(model)


@pytest.mark.usefixtures("without_a_gpu")
def test_there_is_no_graph_while_something_hooks_into_every_module() -> None:
    model, made, show = nn.Linear(3, 2), Graphs(), shown_by([Within()])
    for number in range(5):
        made.show(model, batch_of(4, number), 0, show)
    assert made.number == 1
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *given: None)
    try:
        for number in range(9):
            made.show(model, batch_of(4, number), 0, show)
        assert made.number == 0
    finally:
        handle.remove()


@pytest.mark.usefixtures("without_a_gpu")
def test_no_more_graphs_are_made_than_are_kept() -> None:
    model, made, show = nn.Linear(3, 2), Graphs(), shown_by([Within()])
    for _ in range(5):
        for rows in range(1, 2 * graphs_module.MOST):
            batch = batch_of(rows, rows)
            assert made.show(model, batch, 0, show) == all_of(batch)
    assert made.number == graphs_module.MOST


@pytest.mark.parametrize("waits", [False, True])
def test_what_waits_for_a_gpu_is_told_and_other_warnings_stay(waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[Any] = [0]

    def set_mode(mode: Any) -> None:
        modes.append(mode)
        if mode == "warn":
            # torch's own words begin and end like this
            warnings.warn("Synchronization debug mode is a prototype feature … all synchronizing ops", stacklevel=1)

    def show(batch: Batch) -> Shown:
        warnings.warn("of the user", RuntimeWarning, stacklevel=1)
        if waits:
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
        return Shown(1, {}, SCRIPT)

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with pytest.warns(RuntimeWarning, match="of the user") as said:
        shown, why = graphs_module._watched(show, batch_of(4, 0))
    assert len(said) == 1
    assert shown.out == 1
    assert modes == [0, "warn", 0]
    assert ("synchronizing" in why) == waits
