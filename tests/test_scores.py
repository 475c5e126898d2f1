"""Scores as sums: the same from any parts of the rows as from all of them, and scikit-learn's and SciPy's."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax
from sklearn.metrics import accuracy_score, roc_auc_score
from torch.nn import functional

from pipeline.base_columns import BASE
from pipeline.batch import Batch
from pipeline.scores import added, means, score


def labelled(label_N: torch.Tensor) -> Batch:
    index = torch.arange(len(label_N))
    return Batch((index,), index, label_N)


def parts(logits_NC: torch.Tensor, label_N: torch.Tensor, sizes: list[int]) -> dict[str, float]:
    cuts = zip(logits_NC.split(sizes), label_N.split(sizes), strict=True)
    return means(added(score(logits, labelled(label)) for logits, label in cuts))


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("classes", [2, 5])
def test_they_are_the_libraries_over_all_parts(classes: int, scale: float):
    generator = torch.Generator().manual_seed(classes)
    label_N = torch.randint(classes, (3000,), generator=generator)
    logits_NC = scale * torch.randn(3000, classes, generator=generator, dtype=torch.float64)
    logits_NC += 0.7 * scale * functional.one_hot(label_N, classes)
    logits_NC[:, -1] += 0.3  # untrained models lean to one side
    found = parts(logits_NC, label_N, [1000, 1, 1999])
    assert found["accuracy"] == pytest.approx(accuracy_score(label_N, logits_NC.argmax(1)), abs=1e-12)
    assert found["log_loss"] == pytest.approx(
        log_softmax(logits_NC.numpy(), 1)[range(3000), label_N].mean() * -1, rel=1e-9
    )
    assert ("auc" in found) == (classes == 2)
    if classes == 2:
        # log-odds in 8 bits: of 3,000 rows few change places
        odds_N = logits_NC[:, 1] - logits_NC[:, 0]
        assert found["auc"] == pytest.approx(roc_auc_score(label_N, odds_N), abs=2e-3)
        exact = roc_auc_score(label_N, odds_N.to(torch.bfloat16).float())
        assert found["auc"] == pytest.approx(exact, abs=1e-12)


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_one_row_without_finite_outputs_makes_the_loss_nan_as_the_dictionary_says(odd: float) -> None:
    logits_NC = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 3.0, odd]])
    found = parts(logits_NC, torch.tensor([0, 1, 1]), [2, 1])
    assert math.isnan(found["log_loss"])
    # what is not finite is the greatest output of its row
    assert found["accuracy"] == pytest.approx(2 / 3)
    (value,) = [column for column in BASE["scores"] if column.name == "value"]
    assert "NaN for log_loss and perplexity where any labelled row" in value.null


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(-1, 1), st.floats(-50, 50)), min_size=1, max_size=40), st.integers(0, 40))
def test_how_rows_are_cut_changes_no_score(rows: list[tuple[int, float]], cut: int):
    label_N = torch.tensor([label for label, _ in rows])
    logits_N2 = torch.tensor([[0.0, odds] for _, odds in rows])
    cut = min(cut, len(rows))
    assert parts(logits_N2, label_N, [len(rows)]) == pytest.approx(parts(logits_N2, label_N, [cut, len(rows) - cut]))


@pytest.mark.parametrize("numbers", [1, 20, 64])
@pytest.mark.parametrize("classes", [2, 7])
def test_how_many_logits_are_widened_at_a_time_changes_no_bit(numbers: int, classes: int, monkeypatch):
    generator = torch.Generator().manual_seed(numbers)
    label_N = torch.randint(-1, classes, (50,), generator=generator)
    logits_NC = torch.randn(50, classes, generator=generator)
    at_once = score(logits_NC, labelled(label_N))
    widened: list[int] = []
    double = torch.Tensor.double

    def noted(value: torch.Tensor) -> torch.Tensor:
        widened.append(value.numel())
        return double(value)

    monkeypatch.setattr("pipeline.scores._NUMBERS", numbers)
    monkeypatch.setattr(torch.Tensor, "double", noted)
    assert score(logits_NC, labelled(label_N)) == at_once
    assert max(widened) <= max(numbers, classes, 50)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_log_odds_of_half_precision_are_differences_of_float64(dtype: torch.dtype):
    logits_N2 = torch.tensor([[-40.0, 0.3], [1000.0, -7.25], [-3.1, 60000.0]]).to(dtype)
    odds_N = (logits_N2[:, 1].double() - logits_N2[:, 0].double()).to(torch.bfloat16)
    found = score(logits_N2, labelled(torch.ones(3, dtype=torch.int64)))
    assert {name for name in found if name.startswith("odds")} == {f"odds 1 {value}" for value in odds_N.tolist()}


def test_rows_without_a_label_and_outputs_that_classify_nothing_have_none():
    assert means(score(torch.randn(3, 2), labelled(torch.tensor([-1, -1, -1])))) == {}
    assert score(torch.randn(3, 4, 2), labelled(torch.tensor([0, 1, 1]))) == {}
    assert score((torch.randn(3, 2),), labelled(torch.tensor([0, 1, 1]))) == {}
    assert score(torch.randn(3, 1), labelled(torch.tensor([0, 0, 0]))) == {}
    assert score(torch.randn(3, 7), labelled(torch.tensor([0, 1, 1])), classes=2) == {}
    assert score(torch.randn(3, 2), labelled(torch.tensor([0, 1, 2])), classes=3) == {}
    assert "auc" not in means(score(torch.randn(3, 2), labelled(torch.tensor([1, 1, 1]))))


def test_a_language_models_rows_are_its_tokens():
    token_NT = torch.tensor([[3, 1, 4, 0], [1, 5, 0, 0]])
    mask_NT = torch.tensor([[True, True, True, False], [True, True, False, False]])
    logits_NTV = torch.randn(2, 4, 6, dtype=torch.float64)
    batch = Batch((token_NT,), torch.arange(2), kwargs={"mask": mask_NT})
    found = means(score(logits_NTV, batch, "next token"))
    shown = logits_NTV[[0, 0, 1], [0, 1, 0]]
    expected = functional.cross_entropy(shown, torch.tensor([1, 4, 5])).item()
    assert found["log_loss"] == pytest.approx(expected)
    assert found["perplexity"] == pytest.approx(math.exp(expected))
    assert found["accuracy"] == pytest.approx((shown.argmax(1) == torch.tensor([1, 4, 5])).double().mean().item())
    assert score(logits_NTV, batch, "next token")["labelled"] == 3
