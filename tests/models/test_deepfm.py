from __future__ import annotations

from itertools import combinations

import pytest
import torch

from pipeline.errors import ModelError
from pipeline.models.base import Task
from pipeline.models.deepfm import FAMILY, DeepFMParameters, factorisation_machine
from pipeline.names import Names
from tests.models.build import build, disturbed, on_meta, parameters

TABLE = Task((2,), 2, categories=(3, 5, 4))
SMALL = {"factors": 3, "widths": (6, 5)}


def rows(task: Task, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    category = torch.stack([torch.randint(values, (count,)) for values in task.categories], 1)
    return torch.randn(count, *task.shape, dtype=torch.float64), category


def test_the_papers_criteo_model_has_the_size_computed_by_hand() -> None:
    # 13 numbers and 26 categorical fields; here 1,000 values each; 10 factors, 400-400-400
    fields, values = 13 + 26, 26 * 1000
    embeddings = (values + 13) * (10 + 1)
    deep = (fields * 10 * 400 + 400) + 2 * (400 * 400 + 400) + (400 + 1)
    assert parameters(on_meta("deepfm", Task((13,), 2, categories=(1000,) * 26))) == embeddings + deep


def test_the_factorisation_machine_is_the_sum_over_all_pairs() -> None:
    embedded = torch.randn(7, 6, 4, dtype=torch.float64)
    pairs = sum((embedded[:, f] * embedded[:, g]).sum(1) for f, g in combinations(range(6), 2))
    torch.testing.assert_close(factorisation_machine(embedded), pairs, rtol=1e-13, atol=1e-13)


def test_forward_is_the_papers_over_one_hot_vectors() -> None:
    model = disturbed(build("deepfm", TABLE, **SMALL)).double()
    x, category = rows(TABLE, 9)
    weights = model.state_dict()
    # the paper's x: numbers as they are, a one-hot block for each categorical field
    one_hot = [torch.nn.functional.one_hot(category[:, k], n).double() for k, n in enumerate(TABLE.categories)]
    long = torch.cat([x, *one_hot], 1)
    w = torch.cat([weights["first_order_numbers"], weights["first_order.weight"][:, 0]])
    v = torch.cat([weights["factors_numbers"], weights["factors.weight"]])
    order2 = sum(
        (v[i] @ v[j]) * long[:, i] * long[:, j]
        for i, j in combinations(range(long.shape[1]), 2)  # values of one field never meet
    )
    blocks = [long[:, :1], long[:, 1:2], long[:, 2:5], long[:, 5:10], long[:, 10:]]
    starts = [0, 1, 2, 5, 10]
    a = torch.cat([block @ v[start : start + block.shape[1]] for block, start in zip(blocks, starts, strict=True)], 1)
    for layer in (0, 3):
        a = (a @ weights[f"deep.{layer}.weight"].T + weights[f"deep.{layer}.bias"]).clamp(min=0)
    deep = a @ weights["deep.6.weight"][0] + weights["deep.6.bias"]
    logits = model(x, category)
    torch.testing.assert_close(logits[:, 1], long @ w + order2 + deep, rtol=1e-12, atol=1e-12)
    assert bool((logits[:, 0] == 0).all())


def test_cross_entropy_of_its_logits_is_the_log_loss() -> None:
    model = disturbed(build("deepfm", TABLE, **SMALL)).double()
    logits = model(*rows(TABLE, 9))
    label = torch.randint(2, (9,))
    log_loss = torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 1], label.double())
    torch.testing.assert_close(torch.nn.functional.cross_entropy(logits, label), log_loss)


@pytest.mark.parametrize("task", [Task((4,), 2), Task((0,), 2, categories=(3, 2))])
def test_either_kind_of_field_may_be_absent(task: Task) -> None:
    model = build("deepfm", task, **SMALL).double()
    x, *rest = rows(task, 5) if task.categories else (torch.randn(5, 4, dtype=torch.float64),)
    assert model(x, *rest).shape == (5, 2)


def test_its_inputs_are_named_by_field_and_value() -> None:
    spaces = FAMILY.inputs(DeepFMParameters(**SMALL), TABLE)
    assert spaces["deep.0"].shape == (5, 3)
    assert spaces["deep.0"].names[3 * 3 + 1] == "category 1, factor 1"
    assert spaces["factors"].shape == (2 + 12,)
    assert spaces["factors"].names[1:3] == ("number 1", "category 0 = 0")
    huge = FAMILY.inputs(DeepFMParameters(**SMALL), Task((1,), 2, categories=(1_000_000,)))
    assert huge["factors"].names == ()


def test_a_value_appears_to_the_deep_part_as_a_row_with_it_alone_does() -> None:
    model = disturbed(build("deepfm", TABLE, **SMALL))
    names = Names(fields=("colour",), values=(("(unseen)", "red"),))
    shown = FAMILY.appearances(model, names)["deep.0"]
    assert shown.names[:4] == ("number 0", "number 1", "colour = (unseen)", "colour = red")
    assert len(shown.names) == len(shown.x_TD) == 2 + 12
    x, category = rows(TABLE, 4)
    seen = []
    model.deep[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(x.float(), category)
    thing_NT = torch.zeros(4, 14)
    thing_NT[:, :2] = x
    thing_NT.scatter_(1, category + model.offset_K + 2, 1.0)
    # what the deep part is shown of a row is the sum of what it is shown of each of its things
    torch.testing.assert_close(thing_NT @ shown.x_TD, seen[0])


def test_tells_two_classes_apart_and_no_more() -> None:
    with pytest.raises(ModelError, match="two classes apart, the data has 3"):
        build("deepfm", Task((2,), 3, categories=(3,)))
