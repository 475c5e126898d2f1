"""Class sums against scikit-learn and plain counting; the drawn label."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score, mutual_info_score, precision_score, recall_score

from pipeline.errors import JobError
from pipeline.kernels.by_position import by_position
from pipeline.kernels.classsums import ClassSums
from pipeline.statistics.base import Controls
from pipeline.statistics.labels import STATISTIC, Labels
from tests.laws.drawn import make_presentations, make_site


def labelled(label_N: np.ndarray, rows: int, *, gate: str = "relu", positions: int = 1, seed: int = 0, **fields):
    """Units that lean on class 0, on class 1, and on none."""
    random = np.random.default_rng(seed)
    z = random.normal(size=(rows, positions, 3))
    z[:, :, 0] += (label_N == 0)[:, None] * 2 - 1
    z[:, :, 1] += (label_N == 1)[:, None] - 0.5
    site = make_site(np.ones((3, 1)), gate=gate)
    fields = {"label_N": torch.as_tensor(label_N), "classes": 4, **fields}
    return make_presentations(site, np.zeros((rows, positions, 1, 1)), z_LSU=torch.as_tensor(z), **fields)


def neurons(given, statistic: Labels = STATISTIC) -> dict:
    return statistic.columns(given.site, statistic.observe(given), Controls())["neurons"]


def test_information_and_detection_are_those_of_sklearn() -> None:
    label = np.random.default_rng(1).integers(0, 4, 500)
    given = labelled(label, 500)
    rows = neurons(given)
    fired = (given.z_LSU[:, 0] > 0).numpy()
    for unit in range(3):
        assert float(rows["class_information"][unit]) == pytest.approx(mutual_info_score(label, fired[:, unit]))
        best = label == int(rows["best_class"].values[unit])
        pair = (best, fired[:, unit])
        assert float(rows["best_class_precision"][unit]) == pytest.approx(precision_score(*pair))
        assert float(rows["best_class_recall"][unit]) == pytest.approx(recall_score(*pair))
        assert float(rows["best_class_iou"][unit]) == pytest.approx(jaccard_score(*pair))
    assert rows["best_class"].values[:2].tolist() == [0, 1]
    assert rows["class_information_bias"].tolist() == [3 / 1000] * 3


def test_information_of_drawn_labels_is_the_bias() -> None:
    label = np.random.default_rng(2).integers(0, 4, 2000)
    found = [neurons(labelled(label, 2000, seed=seed, uid_N=torch.arange(2000) + 2000 * seed)) for seed in range(40)]
    mean = torch.stack([rows["class_information_null"] for rows in found]).mean()
    assert float(mean) == pytest.approx(3 / 4000, rel=0.25)
    assert float(found[0]["class_information"][0]) > 50 * float(mean)


def test_drawn_labels_follow_their_prior() -> None:
    sums = ClassSums(null_seed=5, prior=(1, 2, 7))
    share = sums.null_label(torch.arange(100_000), 3).bincount(minlength=3) / 100_000
    np.testing.assert_allclose(share, [0.1, 0.2, 0.7], atol=0.01)


def test_the_control_has_the_prior_of_the_data() -> None:
    # a unit that knows nothing of the class is right as often as its best class is common
    label = (np.random.default_rng(3).random(4000) < 0.95).astype(np.int64)
    rows = neurons(labelled(label, 4000, classes=2))
    prior = np.bincount(label) / len(label)
    for share, best in zip(rows["best_class_precision_null"], rows["best_class_null"].values, strict=True):
        assert float(share) == pytest.approx(prior[int(best)], abs=0.02)


def test_a_prior_for_other_classes_is_refused() -> None:
    with pytest.raises(JobError, match="2 weights, the data has 4 classes"):
        Labels(prior=(1, 1)).observe(labelled(np.zeros(5, dtype=np.int64), 5))


def test_a_row_counts_once_however_many_positions_fire() -> None:
    z = torch.tensor([[[1.0], [2.0], [3.0]], [[-1.0], [-2.0], [-3.0]]])
    given = make_presentations(
        make_site([[1.0]]), np.zeros((2, 3, 1, 1)), z_LSU=z, label_N=torch.tensor([0, 0]), classes=1
    )
    state = ClassSums().observe(given)
    assert (state["n"].item(), state["fired"].item(), state["mean"].item()) == (2, 1, 1.5)


def test_rows_of_unknown_class_are_left_out() -> None:
    label = np.array([0, -1, 1, -1])
    assert ClassSums().observe(labelled(label, 4))["n"].tolist() == [[1, 1, 0, 0]] * 3
    assert int(ClassSums(null_seed=1).observe(labelled(label, 4))["n"].sum(1)[0]) == 2


def test_positions_with_labels_count_each() -> None:
    z = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 5.0, 7.0]])[:, :, None]
    given = make_presentations(
        make_site([[1.0]]), np.zeros((2, 3, 1, 1)), z_LSU=z, classes=2,
        label_LS=torch.tensor([[0, 1, -1], [0, 1, 1]]), mask_LS=torch.tensor([[True] * 3, [True, True, False]]),
    )  # fmt: skip
    state = ClassSums().observe(given)
    found = {name: value[0].tolist() for name, value in state.items()}
    # gate relu: a of z = −1 is 0
    assert found == {"n": [2, 2], "fired": [1, 2], "mean": [0.5, 3.5], "m2": [0.5, 4.5]}


def test_each_position_draws_its_own_label() -> None:
    label_LS = torch.zeros(40, 50, dtype=torch.int64)
    given = replace(labelled(np.zeros(40), 40, positions=50, classes=2), label_N=None, label_LS=label_LS)
    n_C = ClassSums(null_seed=1).observe(given)["n"][0]
    assert int(n_C.sum()) == 2000
    assert abs(int(n_C[0]) - 1000) < 4 * 500**0.5
    by_row = by_position(given).uid_N.view(40, 50)
    assert by_row.unique().numel() == 2000


@pytest.mark.parametrize("null_seed", [None, 1])
def test_a_class_keeps_its_number_beside_data_of_more_classes(null_seed: int | None) -> None:
    sums = ClassSums(null_seed)
    few, many = (
        sums.observe(labelled(np.arange(40) % classes, 40, classes=classes, seed=classes)) for classes in (2, 4)
    )
    for left, right in ((few, many), (many, few)):
        merged = sums.merge(left, right)
        assert torch.equal(merged["n"][:, :2], few["n"] + many["n"][:, :2])
        assert torch.equal(merged["n"][:, 2:], many["n"][:, 2:])
        torch.testing.assert_close(merged["mean"][:, 2:], many["mean"][:, 2:])


def test_what_is_undefined_is_not_invented() -> None:
    label = np.array([0, 1, 2, 3] * 5)
    assert "class_selectivity" not in neurons(labelled(label, 20, gate="tanh"))
    assert "best_class" not in neurons(labelled(label, 20, gate="identity"))
    assert STATISTIC.columns(make_site([[1.0]]), STATISTIC.empty(make_site([[1.0]])), Controls()) == {}


def test_selectivity_is_that_of_morcos() -> None:
    z = torch.tensor([3.0, 1.0, 1.0, 2.0, 0.0, 0.0])[:, None, None]
    label_N = torch.tensor([0, 0, 1, 1, 2, 2])
    given = make_presentations(make_site([[1.0]]), np.zeros((6, 1)), z_LSU=z, label_N=label_N, classes=3)
    # class means 2, 1.5, 0: the others' mean is .75
    assert float(neurons(given)["class_selectivity"]) == pytest.approx((2 - 0.75) / (2 + 0.75))
