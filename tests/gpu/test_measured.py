"""Models measured on a GPU: as the reference kernel measures them there, and as the CPU does to the forward's rounding.

`pytest -m gpu` on a machine with a GPU; elsewhere all of it is skipped.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.batch import Batch
from pipeline.devices import CPU, GPU, device_named, moved
from pipeline.flow.discover import discover
from pipeline.job_sections import Numerics
from pipeline.kernels import choose, triton_build
from pipeline.kernels.base import State
from pipeline.numerics import in_force
from pipeline.registry import families, statistics
from pipeline.running import Running, States
from tests.kernels.fused import FUSED
from tests.models.build import EXAMPLES, build, disturbed, forward_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]
EVERY = pytest.mark.parametrize("family", sorted(families()))
# of a sum in float64 that is added up in another order; what a choice keeps is equal
SUMS = {"rtol": 1e-9, "atol": 1e-12, "equal_nan": True}


def batches(family: str, device: torch.device, dtype: torch.dtype = torch.float32, rows: int = 40) -> list[Batch]:
    made = []
    for number in range(2):
        inputs = forward_inputs(family, rows=rows, seed=number)
        uid_N = torch.arange(len(inputs[0])) + number * 1000
        made.append(moved(Batch(inputs, uid_N, uid_N % 2), device, dtype))
    return made


def measured(
    family: str, device: str, kernel: str, names: list[str], dtype: torch.dtype = torch.float32
) -> tuple[States, list[str]]:
    example = EXAMPLES[family]
    there = device_named(device)
    model = disturbed(build(family, example.task, **example.hyperparameters)).to(there, dtype)
    shown = batches(family, there, dtype)
    with in_force(Numerics()):
        running = Running(discover(model, shown[0]), [statistics()[name] for name in names], 2, kernel)
        for batch in shown:
            running.add(model, batch)
    return running.states(), running.remarks()


def assert_alike(mine: State, yours: State, said: str, **tolerance: Any) -> None:
    assert mine.keys() == yours.keys()
    for name, value in mine.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, yours[name], msg=lambda text: f"{said} {name}: {text}", **tolerance)  # noqa: B023
        else:
            assert torch.equal(value, yours[name]), f"{said} {name}"


@pytest.mark.skipif(triton_build.lacking() is not None, reason="Triton cannot be used")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@EVERY
def test_the_kernel_for_gpus_measures_as_the_reference_does_there(family: str, dtype: torch.dtype) -> None:
    mine, remarks = measured(family, GPU, choose.TRITON, list(FUSED), dtype)
    yours, _ = measured(family, GPU, choose.REFERENCE, list(FUSED), dtype)
    assert remarks == []
    for statistic, sites in mine.items():
        for site, state in sites.items():
            assert_alike(state, yours[statistic][site], f"{statistic} of {site}", **SUMS)


@EVERY
def test_every_statistic_is_measured_as_on_the_cpu(family: str) -> None:
    """Moments to the rounding of a forward in float32; what is counted of rows alone exactly."""
    mine, _ = measured(family, GPU, choose.name(GPU), list(statistics()))
    yours, _ = measured(family, CPU, choose.REFERENCE, list(statistics()))
    for statistic, sites in mine.items():
        assert sites.keys() == yours[statistic].keys()
        for site, state in sites.items():
            for name, value in state.items():
                other = yours[statistic][site][name]
                part = name.rpartition(".")[2]
                if part in ("n", "rows", "nonfinite"):
                    assert torch.equal(value, other), f"{statistic} of {site} {name}"
                elif part in ("mean", "min", "max", "absolute"):
                    torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-4, equal_nan=True)
                elif part == "cov_UD":
                    assert (value - other).norm() <= 1e-3 * other.norm() + 1e-4, f"{statistic} of {site}"
