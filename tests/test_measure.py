"""measure() against the same numbers from raw activations: forward hooks, im2col by hand, NumPy in float64."""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from torch import nn

from pipeline.batch import Batch
from pipeline.errors import DataError, ModelError
from pipeline.hashing import row_hash
from pipeline.job_sections import SiteSelection
from pipeline.loading import find_sites
from pipeline.measure import measure
from pipeline.registry import statistics
from pipeline.samples import SAMPLE_SEED

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


def test_sites_are_chosen_by_name_kind_and_gate(model, rows) -> None:
    def names(**choice: Any) -> list[str]:
        return measure(model, [rows[0]], statistics=[statistics()["weights"]], **choice)["sites"]["site"].to_pylist()

    assert names(include=["kind:conv2d"]) == names(exclude=["gate:identity"]) == names(include=["name:c*"]) == ["conv"]
    assert names(include=["identity"]) == names(exclude=["conv*"]) == ["head"]
    with pytest.raises(ModelError, match=r"no site of the model is chosen by include=\['kind:lstm'\]"):
        names(include=["kind:lstm"])
    with pytest.raises(ValueError, match="kinds: is no label of a site; did you mean 'kind'"):
        names(include=["kinds:conv2d"])
    with pytest.raises(ValueError, match="expected a fraction above 0 and at most 1"):
        names(rows={"*": 0.0})


def test_a_fraction_of_the_rows_is_the_same_rows_however_they_come(model, rows) -> None:
    x, _ = rows
    some = [statistics()["response"], statistics()["exemplars"]]
    fractions = {"kind:conv2d": 0.3, "*": 0.6}
    whole = measure(model, [x], statistics=some, rows=fractions)
    parts = measure(model, x.split(17), statistics=some, rows=fractions)
    kept = row_hash(torch.arange(90), seed=SAMPLE_SEED).double() / 2.0**63
    assert 10 < (kept < 0.3).sum() < 45
    for measured in (whole, parts):
        assert set(column(measured, "conv", "n")) == {16 * int((kept < 0.3).sum())}
        assert set(column(measured, "head", "n")) == {int((kept < 0.6).sum())}
        assert dict(zip(*[measured["sites"][name].to_pylist() for name in ("site", "row_fraction")], strict=True)) == {
            "conv": 0.3,
            "head": 0.6,
        }
    frame = whole["exemplars"].to_pandas()
    assert set(frame[frame.site == "conv"].uid) <= set((kept < 0.3).nonzero()[:, 0].tolist())
    z = captured(model, x[kept < 0.3])["conv.z"]
    np.testing.assert_allclose(column(parts, "conv", "z_mean"), z.mean(0), atol=1e-5)


def test_the_model_comes_back_in_the_mode_it_had(rows) -> None:
    fresh = Conv().train()
    fresh.norm.eval()
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    measure(fresh, [rows[0]], statistics=[statistics()["weights"]])
    assert [name for name, module in fresh.named_modules() if module.training] == ["", "conv", "head"]
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())


def test_sites_say_what_their_inputs_are(tables) -> None:
    conv, head = tables["sites"].to_pylist()
    assert (conv["input_kind"], conv["input_shape"], conv["receptive_field"]) == ("pixels", [2, 3, 3], [3, 1, -1] * 2)
    assert conv["upstream"] is None
    assert head["upstream"] == [f"conv/{channel}" for channel in range(5) for _ in range(16)]


def test_arguments_in_a_pair_with_labels_and_masks_of_a_dictionary() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.layer(x) * attention_mask[..., None]

    x, mask, y = torch.randn(4, 5, 3), torch.ones(4, 5, dtype=torch.int64), torch.arange(4) % 2
    mask[1, 2:] = 0
    some = [statistics()["response"]]
    named = measure(Joined(), [{"x": x, "attention_mask": mask}], statistics=some)
    assert set(named["neurons"]["n"].to_pylist()) == {17}
    paired = measure(Joined(), [((x, mask), y), ({"x": x, "attention_mask": mask}, y)], statistics=some, classes=2)
    assert set(paired["neurons"]["n"].to_pylist()) == {37}
    with pytest.raises(TypeError, match="make it a Batch"):
        measure(Joined(), [object()])


def test_a_label_for_each_position_is_one_only_where_there_are_classes() -> None:
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor, more: torch.Tensor | None = None) -> torch.Tensor:
            return self.layer(x if more is None else x + more[..., None]).relu()

    x, y = torch.randn(4, 5, 3), torch.arange(20).view(4, 5) % 3 - 1
    pixels = measure(Added(), [(x.view(4, 1, 5, 3), y.view(4, 1, 5)), (x[:1], y[:1, :2])], classes=2)
    # the second batch has two labels for five positions
    assert pixels["classes"]["n"].to_pylist() == [7, 6] * 2
    assert set(pixels["neurons"]["importance_rows"].to_pylist()) == {0}
    assert "classes" not in measure(Added(), [(x, y)])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (Batch((torch.ones(2, 3),), torch.tensor([7, 9]), torch.tensor([0, 255])), "row 9 has label 255"),
        ((torch.ones(2, 3), torch.tensor([3, -1])), "row 4 has label 3"),
        ((torch.ones(1, 2, 3), torch.tensor([[1, 255]])), "row 4 has label 255"),
        (Batch((torch.ones(2, 3),), torch.tensor([7, 9]), torch.tensor([0])), r"int64 of shape \(1,\): .* N = 2 rows"),
        (Batch((torch.ones(1, 3),), torch.tensor([7]), torch.tensor([0.0])), r"label_N is float32 .* expected int64"),
    ],
)
def test_labels_of_no_class_are_refused(batch: Any, message: str) -> None:
    fine = (torch.ones(4, 3), torch.tensor([0, 2, -1, -100]))
    layer = nn.Linear(3, 2)
    assert sum(measure(layer, [fine], classes=3)["classes"]["n"].to_pylist()) == 4
    with pytest.raises(DataError, match=message):
        measure(layer, [fine, batch], classes=3)


def test_any_label_goes_where_none_is_used() -> None:
    tables = measure(nn.Linear(3, 2), [(torch.ones(2, 3), torch.tensor([0, 255]))])
    assert tables["neurons"]["n"].to_pylist() == [2, 2]


class Cascade(nn.Module):
    """A detector: its second stage sees what its first has found."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 1), nn.Linear(3, 2)
        with torch.no_grad():
            self.first.weight.copy_(torch.tensor([[1.0, 0.0, 0.0]]))
            self.first.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor | None:
        hits = (self.first(x)[:, 0] > 0).nonzero()[:, 0]
        return self.second(x[hits]) if len(hits) else None


def test_a_stage_that_the_first_batch_does_not_reach_is_measured_too() -> None:
    below, above = -torch.rand(4, 3), torch.rand(5, 3)
    measured = measure(Cascade(), [below, above, above, below], statistics=[statistics()["response"]])
    assert column(measured, "first", "n").tolist() == [18]
    assert column(measured, "second", "n").tolist() == [10, 10]
    assert measured["sites"]["interpreted"].to_pylist() == [True, True]


def test_a_stage_that_few_rows_do_not_reach_is_shown_more_of_them() -> None:
    x = torch.cat([-torch.rand(20, 3), torch.rand(5, 3)])

    def first(rows: int) -> Batch:
        return Batch(inputs=(x[:rows],), uid_N=torch.arange(min(rows, len(x))))

    found = find_sites(Cascade(), first, SiteSelection())
    assert [site.name for site in found.sites] == ["first", "second"]


def test_no_batch_is_said_so(model) -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        measure(model, [])


def test_batches_without_a_row_show_nothing_of_the_model() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(6, 3)
    expected = measure(model, [x])
    found = measure(model, [x[:0], x[:0], x, x[:0]])
    assert found["sites"]["gate"].to_pylist() == ["relu", "identity"]
    for table, rows in expected.items():
        # NaN is NaN there
        pd.testing.assert_frame_equal(found[table].to_pandas(), rows.to_pandas())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batches": torch.ones(4, 3)}, "batches is one Tensor: expected several; [batch] is one batch"),
        ({"batches": np.ones((4, 3))}, "batches is one ndarray: expected several"),
        ({"batches": {"x": torch.ones(4, 3)}}, "batches is one dict: expected several"),
        ({"batches": Batch((torch.ones(4, 3),), torch.arange(4))}, "batches is one Batch: expected several"),
        (
            {"statistics": ["response"]},
            "statistics[0] is 'response': expected a value of pipeline.registry.statistics()",
        ),
        ({"statistics": [statistics()["response"]] * 2}, "statistics[1] is response a second time"),
        ({"rows": 0.5}, "rows = 0.5: expected a fraction for each pattern"),
        ({"classes": -1}, "classes = -1: expected how many there are, or 0"),
        ({"twin": "net"}, "twin is a str: expected a torch.nn.Module"),
        ({"twin": nn.Linear(3, 2, device="meta")}, "twin is on the meta device: expected one with weights"),
        ({"include": "conv*"}, "include = 'conv*': expected several patterns, ['conv*']"),
        ({"exclude": "conv*"}, "exclude = 'conv*': expected several patterns"),
        ({"twin": nn.Sequential(nn.Linear(3, 2))}, "twin has no site of the model's, by name and units: "),
    ],
)
def test_arguments_that_are_something_else_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        measure(nn.Linear(3, 2), **{"batches": [torch.ones(4, 3)], **given})


@pytest.mark.parametrize("model", [None, nn.Linear, torch.relu, {"weight": torch.ones(2, 3)}])
def test_what_is_no_module_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=r"model is a .*: expected a torch\.nn\.Module"):
        measure(model, [torch.ones(2, 3)])


def test_a_model_made_in_inference_mode_has_no_importance_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    found = measure(model, [(torch.randn(5, 3), torch.arange(5) % 2)], classes=2)["neurons"].to_pandas()
    assert found["importance_mean_ablation"].isna().all()
    assert "made in inference mode" in caplog.text


def test_statistics_come_in_any_collection() -> None:
    model, x = nn.Linear(3, 2), [torch.randn(5, 3)]
    first = measure(model, x, statistics=[statistics()["response"]])
    for some in ({"response": statistics()["response"]}.values(), iter([statistics()["response"]])):
        assert measure(model, x, statistics=some)["neurons"].column_names == first["neurons"].column_names


def test_a_lazy_model_is_told_by_its_parameter() -> None:
    with pytest.raises(ModelError, match=r"parameter 0\.weight has no shape yet"):
        measure(nn.Sequential(nn.LazyLinear(5), nn.ReLU(), nn.Linear(5, 2)), [torch.randn(5, 3)])


def test_what_a_twin_lacks_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(OrderedDict(body=nn.Linear(3, 4), gate=nn.ReLU(), head=nn.Linear(4, 2)))
    twin = nn.Sequential(OrderedDict(body=nn.Linear(3, 4), gate=nn.ReLU(), fc=nn.Linear(4, 2)))
    measure(model, [torch.randn(5, 3)], twin=twin)
    assert "the twin has no site like head: no control" in caplog.text


@pytest.mark.parametrize(
    ("uid_N", "message"),
    [
        (torch.tensor([0.0, 1.0]), "uid_N is float32 of shape (2,): expected a tensor of int64, one for each row"),
        (torch.tensor([[0], [1]]), "uid_N is int64 of shape (2, 1): expected a tensor of int64, one for each row"),
        (np.arange(2), "uid_N is a ndarray: expected a tensor of int64, one for each row"),
        (torch.tensor([0, -1]), "uid_N has -1: expected names from 0 on"),
        (torch.tensor([7, 7]), "uid_N has 7 2 times: expected another for each row"),
    ],
)
def test_uids_that_cannot_name_rows_are_refused(uid_N: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        measure(nn.Linear(3, 2), [Batch((torch.ones(2, 3),), uid_N)])


def test_a_twin_of_other_fan_in_is_no_control() -> None:
    x, weights = torch.randn(8, 4), statistics()["weights"]
    layers = (nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3)) for width in (5, 6))
    found = measure(next(layers), [x], statistics=[weights], twin=next(layers))["neurons"]
    assert found["twin_cos"].null_count == found["twin_distance"].null_count == 5 + 3


def test_an_untrained_twin_gives_its_columns(model, rows) -> None:
    torch.manual_seed(9)
    twin = Conv()
    measured = measure(model, [rows[0]], statistics=[statistics()["weights"]], twin=twin)["neurons"].to_pandas()
    head = measured[measured.site == "head"]
    w, v = model.head.weight.detach().double(), twin.head.weight.detach().double()
    np.testing.assert_allclose(head.twin_cos, nn.functional.cosine_similarity(w, v).numpy(), rtol=1e-9)
    np.testing.assert_allclose(head.twin_distance, (w - v).norm(dim=1).numpy(), rtol=1e-9)


@pytest.mark.parametrize(("outputs", "classes"), [(1, 2), (7, 2), (2, 3)])
def test_there_is_no_importance_where_the_output_is_not_a_score_of_each_class(outputs, classes, caplog) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, outputs))
    batches = [(torch.randn(40, 6), torch.arange(40) % classes)]
    found = measure(layers, batches, classes=classes, statistics=[statistics()["importance"]])["neurons"]
    assert found["importance_rows"].to_pylist() == [0] * (4 + outputs)
    assert found["importance_zero_ablation"].null_count == found["importance_mean_ablation"].null_count == 4 + outputs
    assert f"importance is empty: the model returned a tensor of shape (40, {outputs})" in caplog.text


def test_a_module_called_many_times_is_measured_by_the_labels_of_positions() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(10):
                x = self.layer(x).relu()
            return x

    torch.manual_seed(0)
    y = torch.randint(0, 3, (6, 5))
    found = measure(Loop(), [(torch.randn(6, 5, 4), y)], classes=3, statistics=[statistics()["labels"]])
    assert found["neurons"]["best_class"].null_count == 0


class Against(nn.Module):
    """Its only weights are a buffer."""

    def __init__(self, known: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("known", known)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.known).relu()


def test_nothing_is_left_on_tensors_of_the_caller(tmp_path) -> None:
    torch.manual_seed(0)
    response = [statistics()["response"]]
    x, held = torch.randn(5, 6), type("Held", (), {})()
    held.x = torch.randn(5, 6)
    layer = nn.Linear(6, 5)
    inside = Batch(inputs=(held,), uid_N=torch.arange(5), call=lambda model, batch: model(batch.inputs[0].x))
    for batches in ([x], [x] * 4, [inside], [inside] * 4, [layer.weight], [layer.weight] * 4):
        measure(layer, batches, statistics=response)
        assert [*vars(x), *vars(held.x), *vars(layer.weight)] == []
    torch.save([x, held.x], tmp_path / "x.pt")
    assert torch.equal(torch.load(tmp_path / "x.pt")[0], x)
    assert measure(Against(x), [torch.randn(8, 6)], statistics=response)["sites"]["gate"].to_pylist() == ["relu"]


def test_nothing_is_left_on_what_a_model_keeps() -> None:
    class Keeping(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.last, self.table = x.relu(), torch.arange(6.0)
            return super().forward(x + self.table)

    model = Keeping(6, 5)
    model.last = last = torch.zeros(4, 6)
    for batches in ([torch.randn(4, 6)], [torch.randn(4, 6)] * 4):
        assert measure(model, batches, statistics=[statistics()["response"]])["sites"]["gate"].to_pylist() == [
            "identity"
        ]
        assert model.last is last
        assert not hasattr(model, "table")
        assert [*vars(last), *vars(model.weight)] == []


def test_a_tensor_that_is_given_twice_stays_one() -> None:
    class Same(nn.Linear):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return super().forward(x if x is y else x * 2)

    x, model = torch.ones(4, 6), Same(6, 5)
    found = measure(model, [(x, x)], statistics=[statistics()["response"]])["neurons"]
    np.testing.assert_allclose(found["z_mean"].to_numpy(), nn.Linear.forward(model, x)[0].detach().numpy(), rtol=1e-5)


def test_batches_of_no_row_are_passed_over() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, dropout=0.0)
    batches = [torch.randn(4, 3, 6), torch.randn(0, 3, 6), torch.randn(2, 3, 6)]
    found = measure(encoder, batches, statistics=[statistics()["response"]])["neurons"]
    assert set(found["n"].to_pylist()) == {18}


@pytest.mark.parametrize(
    ("y", "found"),
    [
        (torch.zeros(4, dtype=torch.int32), "int32 of shape (4,)"),
        (torch.zeros(4), "float32 of shape (4,)"),
        (torch.zeros(3, dtype=torch.int64), "int64 of shape (3,)"),
        ([0, 1, 1, 0], "a list of 4 integers"),
    ],
)
def test_what_can_only_be_meant_as_labels_is_refused_as_such(y, found) -> None:
    with pytest.raises(DataError, match=re.escape(f"in a pair (x, y) of 4 rows y is {found}: expected int64 labels")):
        measure(nn.Linear(6, 5), [(torch.randn(4, 6), y)], classes=5)


@pytest.mark.parametrize("classes", ["3", 3.0, True, None])
def test_a_number_of_classes_that_is_none_is_refused(classes) -> None:
    with pytest.raises(ValueError, match=re.escape(f"classes = {classes!r}: expected how many")):
        measure(nn.Linear(6, 5), [torch.randn(4, 6)], classes=classes)


def test_a_number_is_no_batch() -> None:
    with pytest.raises(TypeError, match="got a number"):
        measure(nn.Linear(6, 5), [torch.tensor(3.0)])


def test_a_mask_that_is_added_to_scores_is_refused() -> None:
    class Masked(nn.Linear):
        def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    real = torch.tensor([[True, True, False]] * 4)
    given = {"x": torch.randn(4, 3, 6), "attention_mask": real.double()}
    found = measure(Masked(6, 5), [given], statistics=[statistics()["response"]])["neurons"]
    assert set(found["n"].to_pylist()) == {8}
    given["attention_mask"] = torch.zeros(4, 3).masked_fill(~real, -1e9)
    with pytest.raises(DataError, match=re.escape("attention_mask has -1e+09: expected 1 where a position is real")):
        measure(Masked(6, 5), [given])


def test_what_fails_in_the_twin_is_said_to() -> None:
    with pytest.raises(ModelError, match=r"the twin, shown the model's probe: .*dtype"):
        measure(nn.Linear(6, 5), [torch.randn(4, 6)], twin=nn.Linear(6, 5).double())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_quantised_layers_are_named_as_not_measured() -> None:
    layers = nn.Sequential(nn.Linear(6, 5), nn.ReLU())
    packed = torch.ao.quantization.quantize_dynamic(layers, {nn.Linear})
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), packed)
    found = measure(model, [torch.randn(4, 6)], statistics=[statistics()["response"]])["sites"].to_pylist()
    assert [(site["site"], site["interpreted"]) for site in found] == [("0", True), ("2.0", False)]
    assert "its weight is quantised and packed, by quantized::linear_dynamic" in found[1]["reason"]


def test_experts_may_be_shown_nothing_in_a_batch() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.out = nn.Linear(6, 8), nn.Linear(8, 3)
            self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.enter(x)
            out = torch.zeros_like(h)
            for expert, mask in zip(self.experts, (x[:, 0] > 0, x[:, 0] <= 0), strict=True):
                rows = mask.nonzero()[:, 0]
                out = out.index_add(0, rows, torch.relu(expert(h[rows])))
            return self.out(out)

    torch.manual_seed(0)
    x = torch.randn(9, 6)
    x[:, 0] = torch.arange(9) - 4.5
    label = torch.arange(9) % 3
    batches = [(x[part], label[part]) for part in (slice(0, 8), slice(8, 9), slice(0, 2))]
    neurons = measure(Routed().eval(), batches, classes=3)["neurons"].to_pandas()
    shown = neurons.groupby("site")["n"].first().to_dict()
    assert shown == {"enter": 11, "experts.0": 4, "experts.1": 7, "out": 11}
