"""What the literature says of trained networks, on the digits, each number beside its control.

    neuron-census run jobs/literature.toml --store ./census
    python -m jobs.literature --store ./census

Training rows. Reference: one MLP 64-128-64-10 (SGD, weight decay 5e-4, 400 epochs). NC1 to NC4: Papyan, Han & Donoho
2020, PNAS 117:24652. Feature ansatz: Radhakrishnan et al. 2024, Science 383:1461.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import nn

from pipeline.errors import CensusError
from pipeline.fit.recipe import Recipe
from pipeline.hashing import splitmix64
from pipeline.job import load_job
from pipeline.models.base import checkpoint_key, decode_checkpoint
from pipeline.options import store_option
from pipeline.query import connect
from pipeline.report.questions import QUESTIONS
from pipeline.resolve import resolve
from pipeline.run_models import Model
from pipeline.sources.digits import GREATEST, TEST_BELOW
from pipeline.store import Store, open_store

JOB = Path(__file__).with_suffix(".toml")
CLASSES = 10
# affine maps of the network by their place in it: two hidden layers, and the classifier
LAYERS = {"hidden0": 1, "hidden1": 3, "classifier": 5}
# a Jacobian of every row would say no more
ANSATZ_ROWS = 400


@dataclass(frozen=True)
class Line:
    """One finding: means over the networks. `chance`: the same of other units or classes; None where there is none."""

    measure: str
    reference: str
    trained: float
    untrained: float
    chance: float | None = None


def report(store: Store) -> list[Line]:
    """Every finding of the committed run of the job. StoreError or QueryError where there is none."""
    return [*of_tables(store), *of_activations(pairs(store), *training_rows())]


def of_tables(store: Store) -> Iterator[Line]:
    """What follows from the tables."""
    con = connect(store, run=resolve(load_job(JOB), store).run)

    def asked(sql: str) -> list[dict[str, Any]]:
        return con.sql(sql).to_arrow_table().to_pylist()

    # the classifier's cosine is NC3 in another form
    for layer, reference in (("hidden0", "0.46 → 0.74"), ("hidden1", "0.35 → 0.76")):
        (one,) = asked(
            f"SELECT avg(t.template_cos) AS trained, avg(i.template_cos) AS untrained, "
            f"avg(t.template_cos_other_mean) AS chance FROM neurons t JOIN models m USING (run, model, data) "
            f"JOIN neurons i ON (i.model, i.data, i.site, i.unit, i.split) = "
            f"(m.control, t.data, t.site, t.unit, t.split) WHERE t.split = 'train' AND t.site = '{layer}' "
            f"AND isfinite(t.template_cos) AND isfinite(i.template_cos)"
        )
        yield Line(f"cos(Cov(a, x), w), {layer}", reference, **one)
    collapse = [one for one in asked(QUESTIONS["collapse"].sql) if one["split"] == "train"]
    for name, meaning, reference in (
        ("nc1", "variance within classes over between", "1.12 → 0.29"),
        ("nc2", "spread of the cosines between class means", "not reached"),
        ("nc3", "class's row of weights with its mean", "−0.02 → 0.94"),
    ):
        trained, untrained = (np.mean([one[key] for one in collapse]) for key in (name, f"{name}_before"))
        yield Line(f"{name.upper()}, {meaning}", reference, float(trained), float(untrained))
    (one,) = asked(
        "SELECT avg(dead::INT) FILTER (control_of IS NULL) AS trained, "
        "avg(dead::INT) FILTER (control_of IS NOT NULL) AS untrained "
        "FROM neurons JOIN models USING (run, model, data) WHERE split = 'train' AND site = 'hidden1'"
    )
    yield Line("dead units, share of hidden1", "0.02", **one)


Pair = tuple[nn.Sequential, nn.Sequential]


def of_activations(networks: list[Pair], x: torch.Tensor, label_N: torch.Tensor) -> Iterator[Line]:
    """What needs more than the tables hold: decisions, and how the whole network depends on a layer's input."""
    pairs_of = [[align(model, x, label_N) for model in pair] for pair in networks]
    (trained, untrained), (others, _) = (np.mean([[one[at] for one in pair] for pair in pairs_of], 0) for at in (0, 1))
    yield Line("NC3 again, from raw activations", "−0.02 → 0.94", float(trained), float(untrained), float(others))
    agree = np.mean([[agreement(model, x, label_N) for model in pair] for pair in networks], 0)
    yield Line("NC4, decides as the nearest class mean", "→ 1", *agree.tolist(), chance=1 / CLASSES)
    for layer, place in LAYERS.items():
        found = np.mean([[ansatz(model, place, x[:ANSATZ_ROWS]) for model in pair] for pair in networks], 0)
        note = "1 by construction" if layer == "classifier" else "rises"
        yield Line(f"feature ansatz, {layer}", note, *found.tolist())


def pairs(store: Store) -> list[Pair]:
    """The trained networks, each with its untrained twin."""
    found = {model.id: model for model in resolve(load_job(JOB), store).models}
    return [(_module(one, store), _module(found[one.control], store)) for one in found.values() if one.control]


def _module(model: Model, store: Store) -> nn.Sequential:
    assert isinstance(model.origin, Recipe)
    module = model.origin.build()
    module.load_state_dict(decode_checkpoint(store.get(checkpoint_key(model.id))).weights)
    assert isinstance(module, nn.Sequential)
    return module.eval()


def training_rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels of the training rows, as the source gives them."""
    image_NP, label_N = load_digits(return_X_y=True)
    train = [uid for uid in range(len(label_N)) if splitmix64(uid) >= TEST_BELOW]
    x = torch.from_numpy((image_NP[train] / GREATEST).astype(np.float32)).reshape(-1, 1, 8, 8)
    return x, torch.from_numpy(label_N[train])


def features(model: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """Input of the classifier."""
    with torch.no_grad():
        return model[:-1](x)  # type: ignore[no-any-return]


def class_means(h_ND: torch.Tensor, label_N: torch.Tensor) -> torch.Tensor:
    """Mean of the rows of each class."""
    return torch.stack([h_ND[label_N == one].mean(0) for one in range(CLASSES)])


def align(model: nn.Sequential, x: torch.Tensor, label_N: torch.Tensor) -> tuple[float, float]:
    """Mean cosine of each class's row of weights with its own centred class mean; mean |cosine| with the others'."""
    mean_CD = class_means(features(model, x).double(), label_N)
    rest_CD = nn.functional.normalize(mean_CD - mean_CD.mean(0))
    weight = model[-1].weight
    assert isinstance(weight, torch.Tensor)
    cosine_CC = nn.functional.normalize(weight.detach().double()) @ rest_CD.T
    others_CC = cosine_CC.abs() * (1 - torch.eye(CLASSES, dtype=torch.float64))
    return float(cosine_CC.diagonal().mean()), float(others_CC.sum() / CLASSES / (CLASSES - 1))


def agreement(model: nn.Sequential, x: torch.Tensor, label_N: torch.Tensor) -> float:
    """Share of the rows that the classifier gives the class whose mean is nearest."""
    h_ND = features(model, x)
    nearest_N = torch.cdist(h_ND, class_means(h_ND, label_N)).argmin(1)
    return float((nearest_N == model[-1](h_ND).argmax(1)).double().mean())


def ansatz(model: nn.Sequential, place: int, x: torch.Tensor) -> float:
    """Cosine of WᵀW with the average gradient outer product of the layer's input."""
    with torch.no_grad():
        h_ND = model[:place](x)
    jacobian_NCD = torch.func.vmap(torch.func.jacrev(lambda h: model[place:](h[None])[0]))(h_ND).detach()
    outer_DD = torch.einsum("ncd,nce->de", jacobian_NCD, jacobian_NCD)
    weight = model[place].weight
    assert isinstance(weight, torch.Tensor)
    gram_DD = weight.detach().T @ weight.detach()
    return float((outer_DD * gram_DD).sum() / outer_DD.norm() / gram_DD.norm())


def printed(lines: list[Line]) -> Table:
    """The findings as a table."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("measure", "reference", "untrained", "trained", "by chance"):
        table.add_column(name, justify="left" if name in ("measure", "reference") else "right")
    for line in lines:
        chance = "" if line.chance is None else f"{line.chance:.3f}"
        table.add_row(line.measure, line.reference, f"{line.untrained:.3f}", f"{line.trained:.3f}", chance)
    return table


@click.command()
@store_option
def main(url: str) -> None:
    """Print what the literature says of trained networks beside what the job found."""
    try:
        Console(width=110).print(printed(report(open_store(url))))
    except CensusError as error:
        print(f"{error}; neuron-census run jobs/literature.toml comes first", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
