"""measure() against the same numbers from raw activations: forward hooks, im2col by hand, NumPy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

from pipeline.batch import Batch
from pipeline.measure import measure
from pipeline.registry import statistics

CLASSES = 4


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 5, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(5)
        self.head = nn.Linear(5 * 16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(nn.functional.relu(self.norm(self.conv(x)), inplace=True).flatten(1))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(3)
    built = Conv()
    with torch.no_grad():
        built.norm.weight.copy_(torch.tensor([1.0, -0.7, 0.3, 2.0, 0.5]))
        built.norm.bias.normal_()
        built.norm.running_mean.normal_()
        built.norm.running_var.uniform_(0.5, 2)
    return built.eval()


@pytest.fixture(scope="module")
def rows() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(90, 2, 4, 4, generator=generator), torch.randint(0, CLASSES, (90,), generator=generator)


@pytest.fixture(scope="module")
def tables(model: nn.Module, rows: Any) -> dict[str, pa.Table]:
    x, y = rows
    return measure(model, zip(x.split(32), y.split(32), strict=True), classes=CLASSES)


def captured(model: nn.Module, x: torch.Tensor) -> dict[str, np.ndarray]:
    """x, z and a of both sites as (presentations, …) float64 arrays, rows outermost."""
    with torch.no_grad():
        z = model.norm(model.conv(x))
        patches = nn.functional.unfold(x, 3, padding=1).transpose(1, 2).reshape(-1, 18)
        flat = z.relu().flatten(1)
    units_last = z.permute(0, 2, 3, 1).reshape(-1, 5)
    return {
        "conv.x": patches.double().numpy(),
        "conv.z": units_last.double().numpy(),
        "head.x": flat.double().numpy(),
        "head.z": (flat @ model.head.weight.T + model.head.bias).detach().double().numpy(),
    }


def column(tables: dict[str, pa.Table], site: str, name: str) -> np.ndarray:
    frame = tables["neurons"].to_pandas()
    return frame[frame.site == site].sort_values("unit")[name].to_numpy()


def test_moments_and_firing_are_those_of_the_raw_activations(model, rows, tables) -> None:
    seen = captured(model, rows[0])
    for site in ("conv", "head"):
        z = seen[f"{site}.z"]
        np.testing.assert_allclose(column(tables, site, "z_mean"), z.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(column(tables, site, "z_std"), z.std(0), rtol=1e-5)
        assert (column(tables, site, "n") == len(z)).all()
    np.testing.assert_allclose(column(tables, "conv", "fire_rate"), (seen["conv.z"] > 0).mean(0), rtol=1e-12)
    assert np.isnan(column(tables, "head", "fire_rate").astype(float)).all()
    assert tables["neurons"]["fire_rate"].null_count == CLASSES


def test_cov_and_its_cosine_are_those_of_the_raw_activations(model, rows, tables) -> None:
    seen = captured(model, rows[0])
    x, z = seen["conv.x"], seen["conv.z"]
    a = np.maximum(z, 0)
    scale = (model.norm.weight / torch.sqrt(model.norm.running_var + model.norm.eps)).detach().double().numpy()
    w = model.conv.weight.detach().double().numpy().reshape(5, 18) * scale[:, None]
    cov = (a - a.mean(0)).T @ (x - x.mean(0)) / len(x)
    cos = (cov * w).sum(1) / np.linalg.norm(cov, axis=1) / np.linalg.norm(w, axis=1)
    np.testing.assert_allclose(column(tables, "conv", "template_cos"), cos, atol=1e-5)
    patterns = tables["patterns"].to_pandas()
    patterns = patterns[patterns.site == "conv"].sort_values("unit")
    np.testing.assert_allclose(np.stack(patterns.weight), w, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.stack(patterns["cov"]), cov, atol=1e-5)


def test_match_is_the_correlation_of_patch_and_pattern(model, rows, tables) -> None:
    seen = captured(model, rows[0])
    x, z = seen["conv.x"], seen["conv.z"]
    scale = (model.norm.weight / torch.sqrt(model.norm.running_var + model.norm.eps)).detach().double().numpy()
    w = model.conv.weight.detach().double().numpy().reshape(5, 18) * scale[:, None]
    for unit in range(5):
        rho = np.array([np.corrcoef(patch, w[unit])[0, 1] for patch in x])
        assert column(tables, "conv", "pearson_mean")[unit] == pytest.approx(rho.mean(), abs=1e-5)
        firing = z[:, unit] > 0
        assert column(tables, "conv", "pearson_firing_mean")[unit] == pytest.approx(rho[firing].mean(), abs=1e-5)


def test_greatest_exemplars_are_the_rows_with_the_greatest_peak(model, rows, tables) -> None:
    peak = captured(model, rows[0])["conv.z"].reshape(90, 16, 5).max(1)
    frame = tables["exemplars"].to_pandas()
    for unit in range(5):
        chosen = frame[(frame.site == "conv") & (frame.unit == unit) & (frame.kind == "greatest")].sort_values("rank")
        order = np.lexsort((np.arange(90), -peak[:, unit]))[: len(chosen)]
        assert len(chosen) > 3
        assert chosen.uid.tolist() == order.tolist()


def test_the_split_into_batches_changes_no_count(model, rows, tables) -> None:
    x, y = rows
    whole = measure(model, [(x, y)], classes=CLASSES)
    for name in ("histograms", "classes", "exemplars"):
        counts = [field.name for field in whole[name].schema if field.type in (pa.int64(), pa.int32())]
        assert counts
        for count in counts:
            assert whole[name][count].to_pylist() == tables[name][count].to_pylist(), (name, count)


def test_any_form_of_batch_is_taken(model, rows) -> None:
    x, _ = rows
    some = [statistics()["response"]]
    tensor = measure(model, [x], statistics=some)["neurons"]
    mapping = measure(model, [{"x": x}], statistics=some)["neurons"]
    batch = measure(model, [Batch(inputs=(x,), uid_N=torch.arange(90))], statistics=some)["neurons"]
    assert tensor.equals(mapping)
    assert tensor.equals(batch)


def test_no_batch_is_said_so(model) -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        measure(model, [])


def test_an_untrained_twin_gives_its_columns(model, rows) -> None:
    torch.manual_seed(9)
    twin = Conv()
    measured = measure(model, [rows[0]], statistics=[statistics()["weights"]], twin=twin)["neurons"].to_pandas()
    head = measured[measured.site == "head"]
    w, v = model.head.weight.detach().double(), twin.head.weight.detach().double()
    np.testing.assert_allclose(head.twin_cos, nn.functional.cosine_similarity(w, v).numpy(), rtol=1e-9)
    np.testing.assert_allclose(head.twin_distance, (w - v).norm(dim=1).numpy(), rtol=1e-9)
