from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn import functional

from pipeline.batch import Batch
from pipeline.fit.objective import area_under_curve, losses, predictions, scores, targets
from pipeline.registry import families

MLP, GPT, DEEPFM = (families()[name] for name in ("mlp", "gpt", "deepfm"))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_each_model_is_torchs(smoothing: float) -> None:
    logits = torch.randn(3, 7, 5, dtype=torch.float64)
    label = torch.randint(5, (3, 7))
    label[1, 2:5] = -1
    expected = [
        functional.cross_entropy(one, target, ignore_index=-1, label_smoothing=smoothing)
        for one, target in zip(logits, label, strict=True)
    ]
    torch.testing.assert_close(losses(logits, label, smoothing), torch.stack(expected), rtol=1e-13, atol=0)


def test_no_target_at_all_is_no_loss() -> None:
    assert losses(torch.randn(1, 4, 3), torch.full((1, 4), -1), 0.0).tolist() == [0.0]


def test_a_language_model_is_to_say_the_next_real_token() -> None:
    token = torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0]])
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    padded = Batch((token,), torch.arange(2), kwargs={"mask": mask})
    assert targets(GPT, padded).tolist() == [[4, 5, 6], [8, -1, -1]]
    assert targets(GPT, Batch((token,), torch.arange(2))).tolist() == [[4, 5, 6], [8, 0, 0]]
    assert predictions(GPT, torch.zeros(2, 4, 9)).shape == (2, 3, 9)


class Says(nn.Module):
    """Returns logits that it was given."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return self.logits[index]


def test_scores_are_those_of_all_batches_together() -> None:
    logits, label = torch.randn(50, 4), torch.randint(4, (50,))
    label[7] = -1
    known = label >= 0
    batches = [Batch((part,), part, label[part]) for part in torch.arange(50).split(16)]
    found = scores(MLP, Says(logits), batches)
    assert found["loss"] == pytest.approx(functional.cross_entropy(logits[known].double(), label[known]).item())
    assert found["accuracy"] == pytest.approx((logits.argmax(1) == label)[known].double().mean().item())
    assert set(found) == {"loss", "accuracy"}


def test_two_classes_have_an_auc_and_tokens_a_perplexity() -> None:
    logits, label = torch.randn(50, 2), torch.randint(2, (50,))
    index = torch.arange(50)
    assert "auc" in scores(DEEPFM, Says(logits), [Batch((index,), index, label)])
    token = torch.randint(8, (5, 6))

    class Uniform(nn.Module):
        def forward(self, token: torch.Tensor) -> torch.Tensor:
            return torch.zeros(*token.shape, 8)

    found = scores(GPT, Uniform(), [Batch((token,), torch.arange(5))])
    assert found["perplexity"] == pytest.approx(8)
    assert found["loss"] == pytest.approx(math.log(8))


@pytest.mark.parametrize("decimals", [8, 1, 0])
def test_the_auc_is_scikit_learns_with_ties_too(decimals: int) -> None:
    score, positive = torch.randn(200, dtype=torch.float64).round(decimals=decimals), torch.rand(200) < 0.3
    assert area_under_curve(score, positive) == pytest.approx(roc_auc_score(positive, score), abs=1e-14)


def test_one_class_alone_has_no_auc() -> None:
    index = torch.arange(4)
    assert "auc" not in scores(DEEPFM, Says(torch.randn(4, 2)), [Batch((index,), index, torch.ones_like(index))])
