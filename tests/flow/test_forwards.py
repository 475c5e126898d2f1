"""Forwards along a script present what the tap presents, bit by bit; what no script can follow is left to the tap."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipeline.batch import Batch
from pipeline.flow import lazy
from pipeline.flow.discover import discover
from pipeline.flow.forwards import Forwards
from pipeline.flow.tap import tapped_forward
from pipeline.kernels import choose, native_sums
from pipeline.models.base import Task
from pipeline.sites import Presentations
from tests.flow.odd import FORMS, Odd, numbers
from tests.flow.shown import batch_of, expect_as_tapped, expect_the_same_by_script, shown_by
from tests.models.build import build

IMAGES, SERIES, TOKENS = Task((3, 8, 8), 4), Task((3, 12), 4), Task((6,), 4, vocabulary=20)


FAMILIES: dict[str, tuple[Task, dict[str, Any], Callable[[int, int], Any]]] = {
    "mlp": (Task((5,), 3), {}, lambda rows, seed: numbers(rows, 5, seed=seed)),
    "cnn": (IMAGES, {}, lambda rows, seed: numbers(rows, 3, 8, 8, seed=seed)),
    "resnet": (IMAGES, {}, lambda rows, seed: numbers(rows, 3, 8, 8, seed=seed)),
    "tcn": (SERIES, {}, lambda rows, seed: numbers(rows, 3, 12, seed=seed)),
    "transformer": (
        TOKENS,
        {"layers": 2, "width": 8, "heads": 2},
        lambda rows, seed: torch.randint(20, (rows, 6), generator=torch.Generator().manual_seed(seed)),
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_followed_by_one_script_for_each_shape(name: str) -> None:
    task, settings_of, draw = FAMILIES[name]
    model = build(name, task, **settings_of).eval()
    forwards = Forwards(discover(model, batch_of(draw(4, 0))))
    for seed, rows in enumerate([4, 4, 4, 3, 4, 3, 3]):
        expect_as_tapped(forwards, model, batch_of(draw(rows, seed)))
    assert forwards.scripts == 2


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(2, 6), st.booleans()), min_size=3, max_size=9))
def test_batches_of_any_shape_and_mask_in_any_order(shapes: list[tuple[int, int, bool]]) -> None:
    forwards, model = _ENCODER
    for seed, (rows, length, masked) in enumerate(shapes):
        draws = torch.Generator().manual_seed(seed)
        token = torch.randint(20, (rows, length), generator=draws)
        mask_NS = torch.rand((rows, length), generator=draws) < 0.7 if masked else None
        batch = batch_of(token, mask_NS=mask_NS, kwargs={} if mask_NS is None else {"mask": mask_NS})
        expect_as_tapped(forwards, model, batch)


def _encoder() -> tuple[Forwards, nn.Module]:
    model = build("transformer", TOKENS, layers=1, width=8, heads=2).eval()
    return Forwards(discover(model, batch_of(torch.zeros((3, 6), dtype=torch.int64)))), model


_ENCODER = _encoder()


@pytest.mark.parametrize("form", FORMS)
def test_an_odd_model_is_followed(form: str) -> None:
    torch.manual_seed(0)
    model = Odd(form).eval()
    forwards = Forwards(discover(model, batch_of(numbers(3, 4, 6))))
    for seed in range(5):
        expect_as_tapped(forwards, model, batch_of(numbers(3, 4, 6, seed=seed)))
    assert forwards.scripts == 1


class Beside(nn.Module):
    """Does something beside, of which `form` says what."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.mean = torch.zeros(6)
        self.calls = 0
        self.cache: list[torch.Tensor] = []
        self.turns = itertools.count()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.first(x))
        if self.form == "draws":
            y = y + 0 * torch.rand(6)
        elif self.form == "writes to a tensor of its own":
            self.mean += y.mean(0)
        elif self.form == "writes to its input":
            x.add_(1)
        elif self.form == "chooses rows":
            y = y[torch.argsort(y[:, 0])]
        elif self.form == "counts":
            self.calls += 1
        elif self.form == "keeps":
            self.cache = [y]
        elif self.form == "takes turns":
            y = y * 2 if next(self.turns) % 5 == 4 else y
        elif self.form == "draws by NumPy":
            y = y * torch.tensor(np.random.random(), dtype=torch.float32)
        return self.second(y)


def _beside(form: str) -> Forwards:
    """Forwards of which the first layer's z was what it should be."""
    torch.manual_seed(0)
    model = Beside(form).eval()
    forwards = Forwards(discover(model, batch_of(numbers(5, 6)), include=["first"]))
    for seed in range(4):
        seen, _ = shown_by(lambda observe, seed=seed: forwards.run(model, batch_of(numbers(5, 6, seed=seed)), observe))
        assert [one.site.name for one in seen] == ["first"]
        torch.testing.assert_close(seen[0].z_LSU[:, 0], model.first(numbers(5, 6, seed=seed)).detach())
    return forwards


@pytest.mark.parametrize("form", ["draws", "writes to a tensor of its own", "writes to its input", "chooses rows"])
def test_what_a_script_cannot_follow_has_none(form: str) -> None:
    forwards = _beside(form)
    assert forwards.scripts == 0
    assert not forwards.may_script


@pytest.mark.parametrize("form", ["counts", "keeps", "takes turns", "draws by NumPy"])
def test_what_a_model_does_without_tensors_is_none_of_a_scripts_business(form: str) -> None:
    assert _beside(form).scripts == 1


@pytest.mark.parametrize("form", ["in_place", "chunks", "gated", "dropped"])
def test_nothing_is_kept_of_a_batch(form: str) -> None:
    """As many tensors after a forward as before, and inside it at no site more than the tap keeps."""
    torch.manual_seed(0)
    model, batches = Odd(form).eval(), [batch_of(numbers(3, 6, seed=seed)) for seed in range(8)]
    found = discover(model, batches[0])
    forwards = Forwards(found)
    by_tap, by_script = list[int](), list[int]()
    gc.collect()
    gc.disable()
    try:
        start = _tensors()
        tapped_forward(model, found, batches[0], lambda _: by_tap.append(_tensors() - start))
        for batch in batches[1:]:
            by_script.clear()
            before = _tensors()
            forwards.run(model, batch, lambda _, before=before: by_script.append(_tensors() - before))
            assert _tensors() == before
    finally:
        gc.enable()
    assert forwards.scripts == 1
    assert all(one <= other for one, other in zip(by_script, by_tap, strict=True))


def _tensors() -> int:
    return sum(type(one) is torch.Tensor for one in gc.get_objects())


def test_what_a_norm_gives_without_its_gain_is_summed_but_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    forwards, model = _encoder()
    found = forwards.discovery
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)

    def sums(run: Callable[..., Any], seed: int) -> list[torch.Tensor]:
        made = list[torch.Tensor]()

        def observe(shown: Presentations) -> None:
            of_x = shown.input_sums()
            made.extend((of_x.sum_LSG.clone(), of_x.square_LSG.clone(), of_x.centred_LSG.clone()))

        with choose.in_force(choose.NATIVE):
            run(observe=observe, model=model, batch=batch_of(FAMILIES["transformer"][2](3, seed)))
        return made

    tapped = partial(tapped_forward, discovery=found)
    with monkeypatch.context() as patch:
        patch.setattr(native_sums, "of_norm", lambda *_: None)
        wanted = [sums(tapped, seed) for seed in range(4)]
    monkeypatch.setattr(lazy, "before_gain", lambda call: pytest.fail("a norm was made again"))
    for seed, expected in enumerate(wanted):
        for run in (tapped, forwards.run):
            for one, other in zip(sums(run, seed), expected, strict=True):
                assert torch.equal(one, other)
    assert forwards.scripts == 1


def test_labels_and_masks_of_positions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv1d(4, 2, 1)).eval()
    x, classes, mask_NS = numbers(5, 3, 7), torch.randint(3, (5, 7)), torch.rand(5, 7) < 0.5
    batch = batch_of(x, label_NS=classes, mask_NS=mask_NS, label_N=torch.arange(5))
    assert expect_the_same_by_script(model, discover(model, batch), batch).scripts == 1


@pytest.mark.parametrize("differ", ["mask", "strides", "type"])
def test_what_is_part_of_the_signature(differ: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv1d(4, 2, 1)).eval()
    model.register_forward_pre_hook(lambda _, given: given[0].float())
    x, mask_NS = numbers(5, 3, 7), torch.rand(5, 7) < 0.5
    others = {
        "mask": batch_of(x, mask_NS=mask_NS),
        "strides": batch_of(x.mT.contiguous().mT),
        "type": batch_of(x.double()),
    }
    batches = [batch_of(x), others[differ]]
    forwards = Forwards(discover(model, batches[1]))
    for batch in batches * 4:
        expect_as_tapped(forwards, model, batch)
    assert forwards.scripts == 2


def test_a_way_of_calling_is_part_of_the_signature() -> None:
    torch.manual_seed(0)
    model = Odd("in_place").eval()
    x = numbers(3, 6)

    def twice(model: nn.Module, batch: Batch) -> Any:
        return model(2 * batch.inputs[0])

    batches = [batch_of(x), batch_of(x, call=twice)]
    forwards = Forwards(discover(model, batches[0]))
    for batch in batches * 4:
        expect_as_tapped(forwards, model, batch)
    assert forwards.scripts == 2


@pytest.mark.parametrize("batches_before", [0, 1, 2])
def test_an_error_of_a_machine_is_itself_and_its_own_cause_nowhere(batches_before: int) -> None:
    """Whoever follows an error's causes comes to an end."""

    class Full(nn.Linear):
        left = batches_before

        def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
            self.left -= 1
            if self.left < 0:
                raise torch.OutOfMemoryError("full")
            return super().forward(x_ND)

    model, batch = nn.Sequential(Full(4, 3)).eval(), batch_of(torch.randn(6, 4))
    found = discover(nn.Sequential(nn.Linear(4, 3)).eval(), batch)
    forwards = Forwards(found)
    for _ in range(batches_before):
        forwards.run(model, batch, lambda one: None)
    with pytest.raises(torch.OutOfMemoryError) as raised:
        forwards.run(model, batch, lambda one: None)
    assert raised.value.__cause__ is None
    with pytest.raises(torch.OutOfMemoryError) as raised:
        discover(model, batch)
    assert raised.value.__cause__ is None
