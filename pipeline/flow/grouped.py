"""Products of groups of rows with a matrix each, as the products they are: the experts of a mixture.

Layer 1: pure torch.
"""

from __future__ import annotations

import torch

from pipeline.flow.operators import words
from pipeline.flow.values import Call

GROUPED = words("_grouped_mm")


def is_grouped(call: Call) -> bool:
    """Whether the rows of one matrix are met by several matrices: x (T, D), weights (G, D, U), ends of groups (G)."""
    given = call.bound()
    x, weights = given["self"], given["mat2"]
    return x.dim() == 2 and weights.dim() == 3 and given.get("offs") is not None and given.get("bias") is None


def group_by_group(call: Call) -> torch.Tensor:
    """The same result by one product for each group, each of which is followed; rows behind the last group are 0."""
    given = call.bound()
    x, weights, ends = given["self"], given["mat2"], given["offs"].tolist()
    parts = [x[start:end] @ weights[group] for group, (start, end) in enumerate(zip([0, *ends], ends, strict=False))]
    if ends and ends[-1] < len(x):
        parts.append(x.new_zeros((len(x) - ends[-1], weights.shape[2])))
    out = torch.cat(parts)
    dtype = given.get("out_dtype")
    return out if dtype is None else out.to(dtype)
