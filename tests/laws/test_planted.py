"""A network built to detect known templates: the statistics must find those templates, classes and rows again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.batch import Batch
from pipeline.measure import measure

CLASSES, FAN_IN, ROWS = 5, 40, 1500


@pytest.fixture(scope="module")
def planted() -> dict:
    """Rows are a template and noise; unit c has template c as its weights and fires above half of its own match."""
    random = np.random.default_rng(0)
    templates = np.linalg.qr(random.normal(size=(FAN_IN, CLASSES)))[0].T * 6
    label = random.integers(0, CLASSES, ROWS)
    # the strength of the template grows with the row: the last of a class is its best exemplar
    strength = np.linspace(0.8, 1.2, ROWS)
    x = strength[:, None] * templates[label] + random.normal(size=(ROWS, FAN_IN)) * 0.3
    layer = nn.Linear(FAN_IN, CLASSES)
    with torch.no_grad():
        layer.weight.copy_(torch.as_tensor(templates))
        layer.bias.fill_(-18.0)
    batches = [
        Batch((torch.as_tensor(x[i : i + 100]).float(),), torch.arange(i, i + 100), torch.as_tensor(label[i : i + 100]))
        for i in range(0, ROWS, 100)
    ]
    tables = measure(nn.Sequential(layer, nn.ReLU()), batches, classes=CLASSES)
    frames = {name: table.to_pandas() for name, table in tables.items()}
    return {"templates": templates, "label": label, "strength": strength, **frames}


def test_best_class_is_that_of_the_template(planted: dict) -> None:
    neurons = planted["neurons"]
    assert neurons["best_class"].tolist() == list(range(CLASSES))
    for column in ("best_class_precision", "best_class_recall", "best_class_iou"):
        assert (neurons[column] > 0.99).all()
        assert (neurons[f"{column}_null"] < 0.5).all()
    assert (neurons["class_selectivity"] > 0.95).all()
    prior = np.bincount(planted["label"]) / ROWS
    entropy = -(prior * np.log(prior) + (1 - prior) * np.log(1 - prior))
    np.testing.assert_allclose(neurons["class_information"], entropy, rtol=0.02)


def test_exemplars_are_the_rows_with_the_template(planted: dict) -> None:
    exemplars = planted["exemplars"]
    for kind in ("greatest", "random", "match"):
        chosen = exemplars[exemplars["kind"] == kind]
        assert (planted["label"][chosen["uid"]] == chosen["unit"]).all()
        assert (chosen["match"] > 0.9).all()
    smallest = exemplars[exemplars["kind"] == "smallest"]
    assert (planted["label"][smallest["uid"]] != smallest["unit"]).all()
    greatest = exemplars[exemplars["kind"] == "greatest"]
    assert (planted["strength"][greatest["uid"]] > 1.1).all()


def test_match_separates_what_fires(planted: dict) -> None:
    neurons = planted["neurons"]
    assert (neurons["pearson_auroc"] > 0.999).all()
    assert (neurons["pearson_firing_mean"] > 0.9).all()
    assert (neurons["pearson_silent_mean"].abs() < 0.1).all()
    # −b/(‖x‖‖w‖) at a mean ‖x‖ near 6
    np.testing.assert_allclose(neurons["tau"], 18 / 36, rtol=0.1)


def test_what_drives_a_unit_is_its_template(planted: dict) -> None:
    assert (planted["neurons"]["template_cos"] > 0.85).all()
    for unit, sta in zip(planted["patterns"]["unit"], planted["patterns"]["sta"], strict=True):
        wanted = planted["templates"][unit] - planted["templates"].mean(0)
        cosine = sta @ wanted / np.linalg.norm(sta) / np.linalg.norm(wanted)
        assert cosine > 0.98
