"""How sites are named: by the path of the weight's owner.

Layer 1: nothing is found by these names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch


def owner_path(name: str) -> str:
    """The path that names a weight: its module's for "weight", else the parameter's own.

    >>> owner_path("conv.parametrizations.weight.original0"), owner_path("attn.in_proj_weight"), owner_path("w1")
    ('conv', 'attn.in_proj', 'w1')
    """
    parts = name.split(".")
    if "parametrizations" in parts:
        at = parts.index("parametrizations")
        parts = [*parts[:at], parts[at + 1]]
    last = parts[-1]
    if last in ("weight", "weight_orig", "weight_v", "weight_g"):
        return ".".join(parts[:-1]) or last
    return ".".join([*parts[:-1], last.removesuffix("_weight")])


def path_of(names: Collection[str], parameters: Mapping[str, torch.Tensor], module: str) -> tuple[str, str | None]:
    """The path of a weight made of `names`, and the path that it is tied to.

    The path is the running module's if it owns one of them, else that of the largest. `parameters` has tied ones under
    each of their names.
    """
    learned = sorted(set(names) & set(parameters), key=lambda name: (-parameters[name].numel(), name))
    paths = [owner_path(name) for name in learned or sorted(names)]
    first = paths[0]
    if learned:
        paths += [owner_path(name) for name, held in parameters.items() if held is parameters[learned[0]]]
    path = module if module in paths else first
    return path, None if path == first or module in [owner_path(name) for name in learned] else first


PROJECTIONS = {
    3: re.compile(r"qkv|in_proj|query_key_value|c_attn|attn_proj", re.IGNORECASE),
    2: re.compile(r"kv|key_value|in_proj", re.IGNORECASE),
}


def projection_labels(path: str, parts: int) -> tuple[str, ...] | None:
    """The labels of a fused projection's equal parts; None where the name does not say that it is one.

    >>> projection_labels("blocks.0.attn.qkv", 3), projection_labels("fc1", 3)
    (('.q', '.k', '.v'), None)
    """
    pattern = PROJECTIONS.get(parts)
    if pattern is None or not pattern.search(path.rpartition(".")[2]):
        return None
    return (".q", ".k", ".v")[3 - parts :]


def slice_label(path: str, weight: torch.Tensor, parameter: torch.Tensor) -> str:
    """How a weight that is some rows of a larger parameter is told from the others: "" if it is all of it."""
    shared = weight.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
    if not shared or weight.numel() == parameter.numel():
        return ""
    per_row = parameter[0].numel()
    first = int(weight.storage_offset() - parameter.storage_offset()) // per_row
    count = weight.numel() // per_row
    total = len(parameter)
    if projection_labels(path, 3) and total % 3 == 0:
        third = total // 3
        if count == third:
            return (".q", ".k", ".v")[first // third]
        if first == third and count == 2 * third:
            return ""
    return f".{first}" if count == 1 else f".{first}-{first + count - 1}"
