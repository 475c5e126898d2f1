"""Mistakes that the field has made with streaming statistics, one test each.

Mistakes of hooks and models are tested with `flow`, those of chunks and ledgers with sources and runs.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import reduce

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from pipeline.fit.recipe import Recipe as TrainingRecipe
from pipeline.measure import measure
from pipeline.registry import statistics
from pipeline.sites import Presentations
from pipeline.statistics.base import Controls
from tests.laws.drawn import Recipe, draw, make_presentations, make_site, split
from tests.laws.laws import plain

RESPONSE, MATCH, LABELS = (statistics()[name] for name in ("response", "match", "labels"))


def shown_z(z, *, gate: str = "relu", **fields) -> Presentations:
    z_LSU = torch.as_tensor(np.asarray(z, dtype=np.float64))
    z_LSU = z_LSU[:, None, None] if z_LSU.ndim == 1 else z_LSU
    site = make_site(np.ones((z_LSU.shape[2], 1)), gate=gate)
    fields = {"dtype": torch.float32, **fields}
    return make_presentations(site, torch.zeros(*z_LSU.shape[:2], 1, 1), z_LSU=z_LSU, **fields)


def neurons(statistic, *pieces: Presentations) -> dict:
    site = pieces[0].site
    state = reduce(lambda left, right: statistic.merge(site, left, right), map(statistic.observe, pieces))
    return statistic.columns(site, state, Controls())["neurons"]


@pytest.mark.parametrize("size", [1, 8])
@pytest.mark.parametrize("ordered", [False, True])
def test_variance_does_not_depend_on_the_size_of_batches(size: int, ordered: bool) -> None:
    # the most copied library scales the difference of means by n_b/n before squaring it: .00007 and .88 of the truth
    z = np.random.default_rng(0).normal(size=512) * 3
    shown = shown_z(np.sort(z) if ordered else z)
    found = neurons(RESPONSE, *split(shown, torch.arange(512) // size))
    assert float(found["z_std"]) == pytest.approx(float(shown.z_LSU.double().std(correction=0)), rel=1e-12)


def test_class_ordered_data_have_the_variance_of_shuffled_ones() -> None:
    # 1.18 for 9.26 by the same library
    z = np.repeat(np.arange(10.0), 100) + np.random.default_rng(1).normal(size=1000)
    found = neurons(RESPONSE, *split(shown_z(z), torch.arange(1000) // 100))
    assert float(found["z_std"]) ** 2 == pytest.approx(np.var(z), rel=1e-6)


@pytest.mark.parametrize("name", sorted(statistics()))
def test_counts_survive_storage(name: str) -> None:
    # a round trip through JSON that drops n makes every later merge weigh by 0
    statistic, shown = statistics()[name], draw(Recipe(0, rows=20))
    if not statistic.applies(shown.site):
        return
    state = statistic.observe(shown)
    stored = load(save({key: value.contiguous() for key, value in state.items()}))
    counts = {key for key, value in state.items() if value.dtype == torch.int64}
    assert counts <= stored.keys()
    twice = statistic.merge(shown.site, stored, stored)
    wanted = statistic.merge(shown.site, state, state)
    for key in counts:
        assert torch.equal(twice[key], wanted[key])
    assert json.loads(json.dumps(statistic.parameters)) is not None


def test_merging_adds_counts() -> None:
    # a merge that multiplies counts agrees with one that adds them for 2 and 2
    shown = shown_z([1.0, -1.0, 2.0, 3.0, 5.0])
    found = neurons(RESPONSE, *split(shown, torch.tensor([0, 0, 1, 1, 1])))
    assert (int(found["n"]), int(found["n_fired"])) == (5, 4)


def test_means_merge_by_their_counts() -> None:
    # the mean of the means is 50.5
    shown = shown_z([1.0, 100.0, 100.0, 100.0])
    assert float(neurons(RESPONSE, *split(shown, torch.tensor([0, 1, 1, 1])))["z_mean"]) == 75.25


def test_counters_go_past_2_to_the_24th() -> None:
    # float32 counters stop at 16,777,216, bfloat16 ones at 256
    shown = shown_z([1.0])
    state = {key: value.clone() for key, value in RESPONSE.observe(shown).items()}
    for key, value in state.items():
        if value.dtype == torch.int64 and not key.endswith("top"):
            state[key] = value * 2**24
    merged = RESPONSE.merge(shown.site, state, RESPONSE.observe(shown))
    found = RESPONSE.columns(shown.site, merged, Controls())["neurons"]
    assert (int(found["n"]), int(found["n_fired"])) == (2**24 + 1, 2**24 + 1)
    assert float(found["z_mean"]) == 1.0


def test_bfloat16_rows_past_256_are_counted() -> None:
    assert int(neurons(RESPONSE, shown_z(np.ones(300), dtype=torch.bfloat16))["n_fired"]) == 300


def test_squares_of_float16_do_not_overflow() -> None:
    # 300² is infinite in float16, and nan_to_num hides it as 0 or 65504
    found = neurons(RESPONSE, shown_z([300.0, -300.0, 400.0, 60000.0], dtype=torch.float16))
    assert float(found["z_std"]) == pytest.approx(np.std([300.0, -300.0, 400.0, 60000.0]), rel=1e-12)


def test_power_sums_would_lose_the_kurtosis_of_far_numbers() -> None:
    # at mean/std 300, float32 power sums give −4136 for 703
    rest = np.zeros(1000)
    rest[0] = 1.0
    shown = shown_z(rest + 300 * rest.std(), dtype=torch.float64)
    z = shown.z_LSU[:, 0, 0].numpy()
    exact = ((z - z.mean()) ** 4).mean() / z.var() ** 2 - 3
    found = float(neurons(RESPONSE, *split(shown, torch.arange(1000) // 64))["z_kurtosis"])
    assert found == pytest.approx(exact, rel=1e-9)
    assert exact > 900


def test_extremes_do_not_start_at_zero() -> None:
    found = neurons(RESPONSE, shown_z([-3.0, -2.0]))
    assert (float(found["z_min"]), float(found["z_max"])) == (-3, -2)
    found = neurons(RESPONSE, shown_z([3.0, 2.0]))
    assert (float(found["z_min"]), float(found["z_max"])) == (2, 3)


def test_a_pre_activation_is_read_before_it_is_overwritten() -> None:
    shown = shown_z([-1.0, 2.0, -3.0])
    state = RESPONSE.observe(shown)
    shown.z_LSU.relu_()
    assert float(RESPONSE.columns(shown.site, state, Controls())["neurons"]["z_min"]) == -3


@pytest.mark.parametrize("name", ["response", "match", "labels", "exemplars"])
def test_padding_is_no_presentation(name: str) -> None:
    # padding tokens counted as zeros stay in the denominator
    statistic = statistics()[name]
    full = draw(Recipe(3, rows=20, positions=1))
    z_LSU = torch.cat([full.z_LSU, torch.full_like(full.z_LSU, 7.0)], 1)
    x_LSGD = torch.cat([full.patches(0, 20), torch.zeros_like(full.patches(0, 20))], 1)
    mask_LS = torch.tensor([True, False]).expand(20, 2)
    padded = make_presentations(
        full.site, x_LSGD, z_LSU=z_LSU, mask_LS=mask_LS, uid_N=full.uid_N, label_N=full.label_N, classes=3
    )
    left, right = (statistic.observe(shown) for shown in (full, padded))
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=1e-12, atol=0, equal_nan=True)


def test_n_is_per_unit() -> None:
    z = torch.ones(10, 1, 2)
    z[:4, 0, 1] = torch.nan
    found = neurons(RESPONSE, shown_z(z))
    assert found["n"].tolist() == [10, 6]
    assert found["n_nonfinite"].tolist() == [0, 4]


def test_one_bad_number_spoils_nothing_else() -> None:
    clean = draw(Recipe(4, rows=30))
    z_LSU = clean.z_LSU.clone()
    z_LSU[3, 0, 1] = torch.inf
    dirty = replace(clean, z_LSU=z_LSU, a_LSU=z_LSU.relu())
    for name in ("response", "match", "labels"):
        left, right = neurons(statistics()[name], clean), neurons(statistics()[name], dirty)
        for column in left:
            ours, theirs = plain(left[column]), plain(right[column])
            for unit in (0, 2):
                wanted = theirs[unit] if theirs[unit] is None else pytest.approx(theirs[unit], nan_ok=True, rel=1e-12)
                assert ours[unit] == wanted, column


def test_the_last_partial_batch_counts() -> None:
    pieces = split(shown_z(np.arange(10.0)), torch.arange(10) // 4)
    assert [piece.rows for piece in pieces] == [4, 4, 2]
    assert int(neurons(RESPONSE, *pieces)["n"]) == 10


def test_a_border_has_shorter_inputs_and_the_match_knows() -> None:
    # zero padding: the same image content gives a smaller z at the border, and the same cosine over what is there
    site = make_site(np.ones((1, 9)), [0.0])
    inner, corner = np.ones(9), np.array([0, 0, 0, 0, 1, 1, 0, 1, 1.0])
    shown = make_presentations(site, np.stack([inner, corner]))
    assert shown.z_LSU.flatten().tolist() == [9, 4]
    assert float(neurons(MATCH, shown)["cosine_mean"]) == pytest.approx((1 + 2 / 3) / 2)


def test_sixty_four_equal_bins_would_lose_the_auroc() -> None:
    # .873 for 1.000 at D = 4608, where matches are of the order of 1/√D
    random = np.random.default_rng(0)
    site = make_site(random.normal(size=(1, 4608)))
    shown = make_presentations(site, random.normal(size=(1000, 4608)), dtype=torch.float64)
    found = neurons(MATCH, shown)
    assert float(found["pearson_auroc"]) > 0.999
    assert float(found["pearson_auroc"]) + float(found["pearson_auroc_bound"]) >= 1 - 1e-12


@pytest.mark.parametrize("gate", ["tanh", "gelu", "identity"])
def test_selectivity_of_signed_values_is_null(gate: str) -> None:
    shown = shown_z(np.arange(-5.0, 5.0), gate=gate, label_N=torch.arange(10) % 2, classes=2)
    assert "class_selectivity" not in neurons(LABELS, shown)


@pytest.mark.parametrize("name", sorted(statistics()))
def test_behind_an_identity_gate_nothing_fires(name: str) -> None:
    statistic, shown = statistics()[name], draw(Recipe(5, rows=20, gate="identity"))
    if not statistic.applies(shown.site):
        return
    rows = statistic.columns(shown.site, statistic.observe(shown), Controls())
    words = ("fire", "firing", "dead", "always_on", "auroc", "half", "best_class", "class_information", "sta", "lift")
    for table, columns in rows.items():
        for column, values in columns.items():
            if any(word in column.split("_") or column.startswith(word) for word in words) and column != "tau":
                assert _all_null(values), f"{table}.{column}"


def _all_null(values) -> bool:
    if isinstance(values, tuple):
        return not bool(values.valid.any())
    return isinstance(values, list) and all(value is None for value in values)


@pytest.mark.parametrize("name", sorted(statistics()))
def test_identities_name_version_and_parameters(name: str) -> None:
    # cache keys that leave out a parameter, a seed or the version hand out another question's answer
    statistic = statistics()[name]
    assert statistic.identity.startswith(f"{name}-")
    assert replace(statistic, sample_rows=12345).identity != statistic.identity

    class Next(type(statistic)):
        version = statistic.version + 1

    assert Next(**statistic.parameters).identity != statistic.identity


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_the_gate_is_the_model_s_own(approximate: str) -> None:
    # flavours of GELU differ by up to 0.02 in common approximations, by 5e-4 in these two
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.GELU(approximate=approximate)).eval()
    x = torch.randn(200, 4)
    found = measure(model, [x], statistics=[RESPONSE])["neurons"]
    with torch.no_grad():
        assert found["a_max"].to_pylist() == model(x).double().amax(0).tolist()
        other = nn.GELU("tanh" if approximate == "none" else "none")(model[0](x))
    assert found["a_max"].to_pylist() != other.double().amax(0).tolist()


def test_dropout_and_batch_statistics_are_those_of_evaluation() -> None:
    # a model measured in training mode drops inputs and normalises by the batch
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU()).train()
    x = torch.randn(50, 4) + 2
    found = measure(model, [x[:40], x[40:]], statistics=[RESPONSE])["neurons"]
    assert all(module.training for module in model)
    assert torch.equal(model[2].running_mean, torch.zeros(3))
    with torch.no_grad():
        z = torch.cat([model.eval()[:3](part) for part in (x[:40], x[40:])]).double()
    assert found["z_max"].to_pylist() == z.amax(0).tolist()


def test_what_is_so_by_construction_is_null() -> None:
    # without a gate S = Σw: undoing Σ finds w whatever the data, as the feature ansatz does in the last layer
    template = statistics()["template"]
    shown = draw(Recipe(6, rows=30, gate="identity"))
    assert "template_cos_whitened" not in neurons(template, shown)
    assert "template_cos_whitened" in neurons(template, draw(Recipe(6, rows=30, gate="relu")))


def test_models_are_named_by_their_seed_their_data_and_the_version_of_their_family() -> None:
    recipe = TrainingRecipe("mlp", 1, {"widths": [4]}, {"steps": 1}, 0, (4,), 3, ("chunk",), "float32", 1, True)
    others = [
        replace(recipe, seed=1),
        replace(recipe, chunks=("another",)),
        replace(recipe, family_version=2),
        replace(recipe, training={"steps": 2}),
        replace(recipe, threads=2),
    ]
    assert len({one.lineage for one in [recipe, *others]}) == 1 + len(others)
