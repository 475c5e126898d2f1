"""The census reads every family: which sites it finds, and that what a family says of inputs is said of them."""

from __future__ import annotations

import pytest
import torch

from pipeline.batch import Batch
from pipeline.flow.discover import discover
from pipeline.registry import families
from tests.models.build import EXAMPLES, NODES, build, forward_inputs

BLOCK = {"query": "identity", "key": "identity", "value": "identity", "out": "identity", "down": "identity"}
GATES = {
    "mlp": {"hidden0": "relu", "classifier": "identity"},
    "cnn": {"block0.conv": "relu", "block1.conv": "relu", "classifier": "identity"},
    "resnet": {
        "stem": "relu",
        **{f"blocks.{block}.conv1": "relu" for block in range(3)},
        **{f"blocks.{block}.conv2": "identity" for block in range(3)},
        "classifier": "identity",
    },
    "tcn": {
        **{f"blocks.{block}.conv{number}": "relu" for block in range(2) for number in (1, 2)},
        "blocks.0.shortcut": "identity",
        "classifier": "identity",
    },
    "deepfm": {"factors": "fm_square", "deep.0": "relu", "deep.3": "identity"},
    "gcn": {"layers.0": "relu", "layers.1": "identity"},
    "transformer": {
        **{f"blocks.0.{name}": gate for name, gate in BLOCK.items()},
        "blocks.0.up": "gelu",
        "classifier": "identity",
    },
    "gpt": {
        **{f"blocks.0.{name}": gate for name, gate in BLOCK.items()},
        "blocks.0.up": "gelu_tanh",
        "token": "identity",
    },
}


@pytest.mark.parametrize("name", sorted(families()))
def test_every_layer_is_a_site(name: str) -> None:
    family, chosen = families()[name], EXAMPLES[name]
    assert name in GATES, f"{name}: expected in GATES of tests/models/test_sites.py the sites of its example"
    model = build(name, chosen.task, **chosen.hyperparameters)
    rows = NODES if family.whole else 6
    found = discover(model, Batch(forward_inputs(name, rows=rows), torch.arange(rows)))
    assert {site.name: site.gate for site in found.sites} == GATES[name]
    sizes = {site.path: site.fan_in for site in found.sites}
    for path, space in family.inputs(family.parameters(**chosen.hyperparameters), chosen.task).items():
        assert sizes[path] == torch.Size(space.shape).numel()


def test_a_short_series_is_read_up_to_its_end() -> None:
    mask = torch.arange(10) < torch.tensor([10, 3, 7, 1, 9, 4])[:, None]
    batch = Batch(forward_inputs("tcn", rows=6), torch.arange(6), kwargs={"mask": mask}, mask_NS=mask)
    model = build("tcn", EXAMPLES["tcn"].task, **EXAMPLES["tcn"].hyperparameters)
    assert {site.name: site.gate for site in discover(model, batch).sites} == GATES["tcn"]
