"""DeepFM: Guo, Tang, Ye, Li & He, DeepFM: A Factorization-Machine based Neural Network for CTR Prediction, IJCAI 2017
(arXiv:1703.04247), §2.

Of each field (a categorical column, or a number) an embedding of k factors. A first-order term, the factorisation
machine Σ_{f<g} ⟨e_f, e_g⟩ and a deep network over the same embeddings are added: the log-odds of a click.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field, PositiveInt
from torch import nn

from pipeline.errors import ModelError
from pipeline.models.base import Appearances, Family, Hyperparameters, Task
from pipeline.names import UNNAMED, Names
from pipeline.sites import InputSpace

# beyond this many values of all fields together a pattern's names would take more memory than the pattern
NAMED_VALUES = 10_000


class DeepFMParameters(Hyperparameters):
    """`factors` of each embedding, `widths` of the deep part in units, `dropout` behind each: the paper's."""

    factors: int = Field(default=10, ge=1)
    widths: tuple[PositiveInt, ...] = Field(default=(400, 400, 400), min_length=1, strict=False)
    dropout: float = Field(default=0.5, ge=0, lt=1)


class DeepFM(Family):
    """A number's embedding is its field's factors times the number. Logits are (0, log-odds): two classes.

    Embeddings start as N(0, 0.01²) and first-order weights at 0 (the paper names no initialisation; so do the
    published implementations), the deep part as PyTorch has it.
    """

    name: ClassVar[str] = "deepfm"
    version: ClassVar[int] = 1
    parameters: ClassVar[type[Hyperparameters]] = DeepFMParameters

    def build(self, parameters: DeepFMParameters, task: Task) -> nn.Module:
        """All three parts over shared embeddings; ModelError unless there are two classes."""
        self.expect(task, "categories", "numbers")
        if task.outputs != 2:
            raise ModelError(f"family deepfm tells two classes apart, the data has {task.outputs}")
        return _DeepFM(parameters, task)

    def inputs(self, parameters: DeepFMParameters, task: Task, names: Names = UNNAMED) -> Mapping[str, InputSpace]:
        """The factorisation machine looks for values of fields, the deep part for factors of fields."""
        fields = [names.feature(column, "number") for column in range(task.shape[0])]
        fields += [names.field(column) for column in range(len(task.categories))]
        factors = tuple(f"{name}, factor {factor}" for name in fields for factor in range(parameters.factors))
        total = task.shape[0] + sum(task.categories)
        return {
            "deep.0": InputSpace("embeddings", (len(fields), parameters.factors), factors),
            "factors": InputSpace("values", (total,), _values(names, task.shape[0], task.categories)),
        }

    def appearances(self, module: _DeepFM, names: Names) -> Mapping[str, Appearances]:
        """To the deep part a value is its field's embedding, with nothing in the other fields; a number is 1."""
        numbers, fields = len(module.factors_numbers), len(module.categories)
        named = _values(names, numbers, module.categories)
        if not named:
            return {}
        factor_TK = torch.cat([module.factors_numbers, module.factors.weight]).detach()
        field_T = torch.cat([torch.arange(numbers), _field_of_each(module.categories) + numbers])
        x_TFK = factor_TK.new_zeros(len(named), numbers + fields, factor_TK.shape[1])
        x_TFK[torch.arange(len(named)), field_T] = factor_TK
        return {"deep.0": Appearances(named, x_TFK.flatten(1))}


def _values(names: Names, numbers: int, categories: tuple[int, ...]) -> tuple[str, ...]:
    """Every number, and every value of every column of categories; none where there are too many."""
    if numbers + sum(categories) > NAMED_VALUES:
        return ()
    values = [names.value(column, value) for column, n in enumerate(categories) for value in range(n)]
    return (*(names.feature(column, "number") for column in range(numbers)), *values)


def _field_of_each(categories: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(len(categories)).repeat_interleave(torch.tensor(categories, dtype=torch.int64))


class _DeepFM(nn.Module):
    offset_K: torch.Tensor

    def __init__(self, parameters: DeepFMParameters, task: Task) -> None:
        super().__init__()
        self.categories = task.categories
        (numbers,), factors, values = task.shape, parameters.factors, sum(task.categories)
        starts = [sum(task.categories[:column]) for column in range(len(task.categories))]
        self.register_buffer("offset_K", torch.tensor(starts, dtype=torch.int64), persistent=False)
        self.first_order = nn.Embedding(values, 1)
        self.first_order_numbers = nn.Parameter(torch.zeros(numbers))
        self.factors = nn.Embedding(values, factors)
        self.factors_numbers = nn.Parameter(torch.empty(numbers, factors))
        nn.init.zeros_(self.first_order.weight)
        nn.init.normal_(self.factors.weight, std=0.01)
        nn.init.normal_(self.factors_numbers, std=0.01)
        layers: list[nn.Module] = []
        width = (numbers + len(task.categories)) * factors
        for units in parameters.widths:
            layers += [nn.Linear(width, units), nn.ReLU(), nn.Dropout(parameters.dropout)]
            width = units
        self.deep = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, x: torch.Tensor, category: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (N, 2) of x (N, D) and category (N, K): the first is 0, the second the log-odds of class 1."""
        linear_N = (x * self.first_order_numbers).sum(1)
        embedded_NFK = x[:, :, None] * self.factors_numbers
        if category is not None:
            value_NK = category + self.offset_K
            linear_N = linear_N + self.first_order(value_NK).sum((1, 2))
            embedded_NFK = torch.cat([embedded_NFK, self.factors(value_NK)], 1)
        log_odds_N = linear_N + factorisation_machine(embedded_NFK) + self.deep(embedded_NFK.flatten(1))[:, 0]
        return torch.stack([torch.zeros_like(log_odds_N), log_odds_N], 1)


def factorisation_machine(embedded_NFK: torch.Tensor) -> torch.Tensor:
    """Σ_{f<g} ⟨e_f, e_g⟩ of each row in time linear in the fields (Rendle 2010, lemma 3.1): ½ Σ_k (Σ_f e)² − Σ_f e²."""
    return 0.5 * (embedded_NFK.sum(1).square() - embedded_NFK.square().sum(1)).sum(1)


FAMILY = DeepFM()
