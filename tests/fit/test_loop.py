from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.batch import Batch
from pipeline.errors import DataError, ModelError
from pipeline.fit.course import CURVE_POINTS
from pipeline.fit.loop import Diverged, Saved, fit
from pipeline.fit.material import Material
from pipeline.fit.recipe import Recipe
from pipeline.fit.rows import Portion, is_held_out, join, take
from pipeline.models.base import Checkpoint, decode_checkpoint, encode_checkpoint
from pipeline.registry import families
from tests.fit.data import batch as made_up
from tests.fit.data import cut, graph, portions, recipe
from tests.models.build import EXAMPLES

every_family = pytest.mark.parametrize("family", sorted(families()))


def checkpoints(
    recipes: Sequence[Recipe], rows: Sequence[Portion], resume: Sequence[Checkpoint] | None = None
) -> dict[tuple[int, int], bytes]:
    """The stored form of every checkpoint of a training, by number and step."""
    return {(one.recipe, one.step): encode_checkpoint(one.checkpoint) for one in saved(recipes, rows, resume)}


def saved(
    recipes: Sequence[Recipe], rows: Sequence[Portion], resume: Sequence[Checkpoint] | None = None
) -> list[Saved]:
    events = list(fit(recipes, rows, resume=resume))
    assert not [one for one in events if isinstance(one, Diverged)]
    return [one for one in events if isinstance(one, Saved)]


@every_family
def test_a_training_taken_up_again_ends_with_the_same_bytes(family: str) -> None:
    one = recipe(family, checkpoints=(4, 9), held_out=0.2, patience=50, evaluate_steps=3, schedule="cosine")
    events = saved([one], portions(family))
    assert [event.step for event in events] == [0, 4, 9, 12]
    for event in events[1:3]:
        stored = decode_checkpoint(encode_checkpoint(event.resume))
        torch.manual_seed(123)  # whatever happened in between
        rest = checkpoints([one], portions(family), [stored])
        assert rest == {
            (0, later.step): encode_checkpoint(later.checkpoint) for later in events if later.step > event.step
        }


@every_family
def test_training_lowers_the_loss(family: str) -> None:
    rates = {"gpt": 0.01, "transformer": 0.01, "gcn": 0.1, "deepfm": 0.02}
    one = recipe(family, steps=60, optimizer="adamw", learning_rate=rates.get(family, 0.01))
    first, last = (event.checkpoint.record["train_loss"] for event in saved([one], portions(family)))
    assert last < 0.97 * first


def test_a_group_changes_no_byte_of_a_checkpoint() -> None:
    recipes = [recipe(seed=seed, checkpoints=(5,), learning_rate=0.05 + 0.01 * (seed % 2)) for seed in range(5)]
    assert len({one.group for one in recipes}) == 1
    alone = [checkpoints([one], portions()) for one in recipes]
    for numbers in ([0, 1], [3, 2], [4, 0, 1, 3, 2]):
        together = checkpoints([recipes[number] for number in numbers], portions())
        expected = {
            (at, step): content for at, number in enumerate(numbers) for (_, step), content in alone[number].items()
        }
        assert together == expected


def test_large_rows_are_held_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    def held(**settings: int) -> int:
        one = recipe(**settings)
        return Material(
            one.kind, one.settings, portions(), seeds=[0], device=torch.device("cpu"), dtype=torch.float32
        ).settings.shuffle_rows

    assert held() == 65_536
    monkeypatch.setattr("pipeline.fit.material.SHUFFLE_BYTES", 40 * 16 * 4)  # rows of 4 × 4 float32
    assert held() == 40
    assert held(shuffle_rows=30) == 30
    assert held(batch_rows=64) == 64


def test_how_chunks_are_read_in_batches_changes_no_weight() -> None:
    def in_batches(size: int) -> list[Portion]:
        def read(one: Portion) -> Iterator[Batch]:
            for batch in one.read():
                for start in range(0, batch.rows, size):
                    part = slice(start, start + size)
                    assert batch.label_N is not None
                    yield Batch((batch.inputs[0][part],), batch.uid_N[part], batch.label_N[part])

        return [replace(one, read=lambda one=one: read(one)) for one in portions()]

    one = recipe("cnn", checkpoints=(5,))
    rows = [
        [replace(part, read=lambda part=part: part.read()) for part in portions("cnn")],
        portions("cnn"),
    ]
    assert checkpoints([one], rows[0]) == checkpoints([one], rows[1])
    other = recipe(steps=6)
    assert checkpoints([other], in_batches(3)) == checkpoints([other], in_batches(64))


def test_recipes_of_different_shape_or_rows_never_share_a_group() -> None:
    first = recipe()
    assert recipe(seed=3).group == recipe(weight_decay=0.1).group == recipe(learning_rate=0.7).group == first.group
    others = [
        recipe(hyperparameters={"widths": (32,)}),
        recipe(steps=13),
        recipe(optimizer="adamw"),
        replace(first, chunks=("other",)),
        replace(first, dtype="float64"),
    ]
    assert len({one.group for one in [first, *others]}) == 6
    assert recipe("cnn", seed=0).group != recipe("cnn", seed=1).group


def test_the_untrained_twin_has_the_initial_weights_and_the_datas_statistics() -> None:
    one = recipe("cnn")
    twin = saved([one], portions("cnn"))[0].checkpoint
    torch.manual_seed(twin_seed(one))
    initial = one.build()
    for name, value in initial.named_parameters():
        assert torch.equal(twin.weights[name], value)
    images = torch.cat([batch.inputs[0] for part in portions("cnn") for batch in part.read()])
    made = initial.get_submodule("block0.conv")(images)
    torch.testing.assert_close(twin.weights["block0.norm.running_mean"], made.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(twin.weights["block0.norm.running_var"], made.var((0, 2, 3)), rtol=1e-4, atol=1e-6)


def test_rows_that_lie_in_order_are_scored_from_their_beginning_to_their_end() -> None:
    whole = made_up(EXAMPLES["cnn"], 6000)
    by_label = take(whole, whole.label_N.argsort(stable=True))
    images = by_label.inputs[0] + by_label.label_N[:, None, None, None]
    lying = replace(by_label, inputs=(images,))
    one = recipe("cnn", held_out=0.7, patience=5, evaluate_steps=4, steps=4)
    parts = [Portion(f"chunk{n}", 2000, lambda n=n: cut(lying, 2000 * n, 2000 * (n + 1), 100)) for n in range(3)]
    material = Material(one.kind, one.settings, parts, seeds=[0], device=torch.device("cpu"), dtype=torch.float32)
    classes = whole.label_N.bincount() / 6000
    for found, held_out in ((material.scored, False), (material.held_out, True)):
        label_N = torch.cat([some.label_N for some in found])
        assert bool((is_held_out(join(found), 0.7) == held_out).all())
        torch.testing.assert_close(label_N.bincount() / len(label_N), classes, atol=0.05, rtol=0)
    # an untrained twin's statistics are those of all classes
    twin = saved([one], parts)[0].checkpoint
    torch.manual_seed(twin_seed(one))
    made = one.build().get_submodule("block0.conv")(images[~is_held_out(lying, 0.7)])
    spread = made.std((0, 2, 3))
    assert bool(((twin.weights["block0.norm.running_mean"] - made.mean((0, 2, 3))).abs() < 0.1 * spread).all())
    torch.testing.assert_close(twin.weights["block0.norm.running_var"], spread**2, rtol=0.1, atol=0)


def twin_seed(one: Recipe) -> int:
    from pipeline.hashing import splitmix64

    return splitmix64(one.seed)


def test_a_model_that_diverges_says_so_and_stops_no_other() -> None:
    good, bad, other = (
        recipe(seed=0, checkpoints=(1, 6)),
        recipe(seed=1, checkpoints=(1, 6), learning_rate=1e30),
        recipe(seed=2, checkpoints=(1, 6)),
    )
    events = list(fit([good, bad, other], portions()))
    (failure,) = [event for event in events if isinstance(event, Diverged)]
    assert failure.recipe == 1
    assert "diverged: " in failure.reason
    assert {event.step for event in events if isinstance(event, Saved) and event.recipe == 1} < {0, 1} | {1}
    kept = {
        (event.recipe, event.step): encode_checkpoint(event.checkpoint) for event in events if isinstance(event, Saved)
    }
    for number, one in ((0, good), (2, other)):
        for (_, step), content in checkpoints([one], portions()).items():
            assert kept[number, step] == content


def test_early_stopping_keeps_the_weights_of_the_least_held_out_loss() -> None:
    noisy = [replace(one, read=lambda one=one: map(shuffled_labels, one.read())) for one in portions(rows=90)]
    one = recipe(
        steps=400, held_out=0.3, patience=3, evaluate_steps=5, checkpoints=(390,), optimizer="adamw", learning_rate=0.02
    )
    events = saved([one], noisy)
    record = events[-1].checkpoint.record
    looks = [(step, loss) for step, quantity, loss in record["curve"] if quantity == "held_out_loss"]
    best = min(loss for _, loss in looks)
    assert record["stopped"] == looks[-1][0] < 390
    assert [loss for _, loss in looks].index(best) == len(looks) - 1 - 3
    model = one.build()
    model.load_state_dict(events[-1].checkpoint.weights)
    batches = [batch for part in noisy for batch in part.read()]
    held = [(batch.inputs[0][is_held_out(batch, 0.3)], batch.label_N[is_held_out(batch, 0.3)]) for batch in batches]
    x, label = (torch.cat(parts) for parts in zip(*held, strict=True))
    assert nn.functional.cross_entropy(model(x).double(), label).item() == pytest.approx(best, rel=1e-6)
    # the checkpoint behind the end is the end
    assert all(
        torch.equal(value, events[-1].checkpoint.weights[name]) for name, value in events[-2].checkpoint.weights.items()
    )


def test_a_training_taken_up_again_ends_as_early() -> None:
    noisy = [replace(one, read=lambda one=one: map(shuffled_labels, one.read())) for one in portions(rows=90)]
    settings = {"held_out": 0.3, "patience": 3, "evaluate_steps": 5, "optimizer": "adamw", "learning_rate": 0.02}
    one = recipe(steps=200, checkpoints=tuple(range(1, 200)), **settings)
    events = saved([one], noisy)
    stopped = events[-1].checkpoint.record["stopped"]
    for before in (1, 6, 11):
        event = events[stopped - before]
        assert event.step == stopped - before
        rest = checkpoints([one], noisy, [decode_checkpoint(encode_checkpoint(event.resume))])
        assert rest[0, 200] == encode_checkpoint(events[-1].checkpoint)


def shuffled_labels(batch: Batch) -> Batch:
    return replace(
        batch, label_N=torch.randint(4, (batch.rows,), generator=torch.Generator().manual_seed(int(batch.uid_N[0])))
    )


@pytest.mark.parametrize("patience", [None, 3])
def test_a_share_that_holds_no_row_out_is_refused_with_the_least_that_does(patience: int | None) -> None:
    rows = portions(rows=90)
    said = r"training.held_out = 0.0001 holds out none of 90 rows to train on: expected 0, or at least ([\d.e-]+)$"
    with pytest.raises(DataError, match=said) as caught:
        next(fit([recipe(held_out=1e-4, patience=patience)], rows))
    least = float(str(caught.value).rpartition(" ")[2])
    assert sum(int(is_held_out(batch, least).sum()) for portion in rows for batch in portion.read()) == 1
    next(fit([recipe(held_out=least, patience=patience)], rows))


def test_a_share_that_leaves_no_row_is_refused() -> None:
    with pytest.raises(DataError, match=r"^training.held_out = 0.999999 leaves no row to train on: expected a smaller"):
        next(fit([recipe(held_out=0.999999, patience=3)], portions(rows=90)))


def test_of_a_graph_no_number_may_be_missing() -> None:
    whole = graph()
    whole.inputs[0][-1, 2] = float("nan")  # of a node whose label is not for training
    rows = [Portion("chunk0", whole.rows, lambda: iter([whole]))]
    with pytest.raises(DataError, match=rf"^the row of uid {whole.uid_N[-1]}: number 2 \(from 0\) is nan in float32"):
        saved([recipe("gcn")], rows)


def test_held_out_rows_are_never_learned_from() -> None:
    def poisoned(batch: Batch) -> Batch:
        x = batch.inputs[0].clone()
        x[is_held_out(batch, 0.2)] = float("nan")
        return replace(batch, inputs=(x,))

    rows = [replace(one, read=lambda one=one: map(poisoned, one.read())) for one in portions()]
    one = recipe(steps=30, held_out=0.2, patience=100, evaluate_steps=10)
    assert len(saved([one], rows)) == 2
    with pytest.raises(
        DataError, match=r"the row of uid \d+: number 0 .* is nan in float32, and nothing can be learned"
    ):
        saved([recipe(steps=30)], rows)


def test_the_curve_is_the_mean_loss_between_its_points() -> None:
    fine = recipe(steps=40)
    every = {step: loss for step, quantity, loss in curve(fine) if quantity == "loss"}
    assert sorted(every) == list(range(1, 41))
    coarse = recipe(steps=3 * CURVE_POINTS, checkpoints=(20,))
    points = {step: loss for step, quantity, loss in curve(coarse) if quantity == "loss"}
    assert sorted(points)[:8] == [3, 6, 9, 12, 15, 18, 20, 21]
    for step, begin in ((3, 1), (18, 16), (20, 19), (21, 21)):
        mean = sum(every[at] for at in range(begin, step + 1)) / (step - begin + 1)
        assert points[step] == pytest.approx(mean, rel=1e-12)
    rates = [rate for _, quantity, rate in curve(recipe(steps=4, schedule="cosine")) if quantity == "learning_rate"]
    assert rates[0] == 0.05
    assert rates == sorted(rates, reverse=True)


def curve(one: Recipe) -> list[tuple[int, str, float]]:
    return saved([one], portions())[-1].checkpoint.record["curve"]  # type: ignore[no-any-return]


@every_family
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_of_the_forward_leaves_the_weights_in_full(family: str, precision: str) -> None:
    low, full = (
        saved([recipe(family, autocast=autocast, checkpoints=(4,))], portions(family))
        for autocast in (precision, "none")
    )
    weights = low[-1].checkpoint.weights
    assert not {value.dtype for value in weights.values()} & {torch.bfloat16, torch.float16}
    assert any(not torch.equal(value, full[-1].checkpoint.weights[name]) for name, value in weights.items())
    for name, value in weights.items():
        torch.testing.assert_close(value, full[-1].checkpoint.weights[name], rtol=0.1, atol=0.05)
    stored = decode_checkpoint(encode_checkpoint(low[1].resume))
    rest = checkpoints([recipe(family, autocast=precision, checkpoints=(4,))], portions(family), [stored])
    assert rest == {(0, 12): encode_checkpoint(low[-1].checkpoint)}


@pytest.mark.parametrize(("dtype", "expected"), [("float64", torch.float64), ("bfloat16", torch.float32)])
def test_weights_are_trained_in_single_precision_or_better(dtype: str, expected: torch.dtype) -> None:
    event = saved([replace(recipe(), dtype=dtype)], portions())[-1]
    assert {value.dtype for value in event.checkpoint.weights.values()} == {expected}


@pytest.mark.parametrize("family", ["mlp", "gcn"])
def test_no_label_at_all_is_refused(family: str) -> None:
    unlabelled = [
        replace(
            one,
            read=lambda one=one: (replace(batch, label_N=torch.full_like(batch.label_N, -1)) for batch in one.read()),
        )
        for one in portions(family)
    ]
    with pytest.raises(DataError, match="no row to train on"):
        saved([recipe(family)], unlabelled)


def test_a_graph_is_learned_from_drawn_neighbours_too() -> None:
    one = recipe(
        "gcn", steps=60, batch_rows=8, neighbours=(4, 4), optimizer="adamw", learning_rate=0.05, checkpoints=(17,)
    )
    first, middle, last = saved([one], portions("gcn"))
    assert last.checkpoint.record["train_loss"] < 0.9 * first.checkpoint.record["train_loss"]
    rest = checkpoints([one], portions("gcn"), [decode_checkpoint(encode_checkpoint(middle.resume))])
    assert rest == {(0, 60): encode_checkpoint(last.checkpoint)}
    assert checkpoints([replace(one, seed=1)], portions("gcn")) != checkpoints([one], portions("gcn"))
    with pytest.raises(ModelError, match="mlp draws no neighbours"):
        recipe("mlp", neighbours=(4,)).build()


def test_scores_fit_the_task() -> None:
    for family, names in (("mlp", set()), ("deepfm", {"auc"}), ("gpt", {"perplexity"})):
        record: dict[str, Any] = saved([recipe(family)], portions(family))[-1].checkpoint.record
        assert set(record["train_scores"]) == names
        assert 0 <= record["train_accuracy"] <= 1
