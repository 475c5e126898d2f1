"""Models of a family as the tests build them, and a small example of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pipeline.models.base import Task
from pipeline.registry import families

NODES = 24


def build(family: str, task: Task, *, seed: int = 0, **hyperparameters: Any) -> nn.Module:
    """A model with freshly initialised weights, in eval mode."""
    found = families()[family]
    torch.manual_seed(seed)
    return found.build(found.parameters(**hyperparameters), task).eval()


def on_meta(family: str, task: Task, **hyperparameters: Any) -> nn.Module:
    """The same without weights: large models have a number of parameters too."""
    with torch.device("meta"):
        return build(family, task, **hyperparameters)


def parameters(model: nn.Module) -> int:
    return sum(value.numel() for value in model.parameters())


def disturbed(model: nn.Module, *, seed: int = 7) -> nn.Module:
    """The same model with every parameter and statistic away from its initial zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                noise = torch.rand(value.shape, generator=generator, dtype=value.dtype)
                value.copy_(0.5 + noise if "var" in name else value + 0.2 * (noise - 0.5))
    return model


@dataclass(frozen=True)
class Example:
    """A small task of a family and hyperparameters that fit it."""

    task: Task
    hyperparameters: dict[str, Any] = field(default_factory=dict)

    def inputs(self, rows: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
        """Rows of the task at random."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return families()["mlp"].example(self.task, rows, torch.float32)


class _Examples(dict[str, Example]):
    def __missing__(self, family: str) -> Example:
        raise KeyError(
            f"{family}: expected in EXAMPLES of tests/models/build.py a small task of it and hyperparameters that fit, "
            "in GATES of tests/models/test_sites.py the sites of that, and in jobs/zoo.toml an entry, as of all"
        )


EXAMPLES = _Examples(
    {
        "mlp": Example(Task((1, 4, 4), 4), {"widths": (16,)}),
        "cnn": Example(Task((1, 8, 8), 4), {"widths": (4, 4)}),
        "resnet": Example(Task((3, 8, 8), 4), {"depth": 8, "widths": (4, 6, 8)}),
        "tcn": Example(Task((2, 10), 4), {"widths": (4, 4), "kernel": 3}),
        "deepfm": Example(Task((2,), 2, categories=(3, 5)), {"factors": 4, "widths": (8,)}),
        "gcn": Example(Task((5,), 4), {"widths": (8,)}),
        "transformer": Example(Task((6,), 4, vocabulary=20), {"layers": 1, "width": 8, "heads": 2}),
        "gpt": Example(Task((6,), 0, vocabulary=20), {"layers": 1, "width": 8, "heads": 2}),
    }
)


def forward_inputs(family: str, rows: int = 3, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """What the forward of the family's example takes."""
    if family == "gcn":
        edge = torch.randint(NODES, (2, 40), generator=torch.Generator().manual_seed(seed + 1))
        return (*EXAMPLES[family].inputs(NODES, seed), edge)
    return EXAMPLES[family].inputs(rows, seed)
