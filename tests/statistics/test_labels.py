"""labels where a row's greatest output, or its drawn label, is not what it seems."""

from __future__ import annotations

import torch
from torch import nn

from pipeline.measure import measure


class Pair(nn.Module):
    """A gated pair with a gate that is never negative, and the same gate by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.paired, self.glu, self.alone = nn.Linear(4, 12), nn.GLU(), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.alone(self.glu(self.paired(x))).sigmoid()


def test_the_selectivity_of_a_pair_is_null_as_its_other_branch_has_either_sign() -> None:
    torch.manual_seed(0)
    x, label_N = torch.randn(60, 4), torch.arange(60) % 3
    tables = measure(Pair(), [(x, label_N)], classes=3)
    gates = dict(zip(tables["sites"]["site"].to_pylist(), tables["sites"]["gate"].to_pylist(), strict=True))
    assert gates == {"paired": "glu", "alone": "sigmoid"}
    for row in tables["neurons"].to_pylist():
        assert (row["class_selectivity"] is None) == (row["site"] == "paired")
        assert (row["class_selectivity_null"] is None) == (row["site"] == "paired")
        assert row["class_information"] is not None
