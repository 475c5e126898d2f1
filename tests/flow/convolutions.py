"""Explicit computation of convolutions in NumPy, one window at a time: the oracle of the flow tests."""

from __future__ import annotations

import itertools

import numpy as np


def windows(
    x: np.ndarray, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...], groups: int
) -> np.ndarray:
    """Patches (N, S, G, D) of an already padded x (N, C, *spatial)."""
    out = [
        (size - step * (k - 1) - 1) // s + 1
        for size, k, s, step in zip(x.shape[2:], kernel, stride, dilation, strict=True)
    ]
    per_group = x.shape[1] // groups
    patches = []
    for at in itertools.product(*map(range, out)):
        groups_here = []
        for group in range(groups):
            numbers = []
            for channel in range(group * per_group, (group + 1) * per_group):
                for offset in itertools.product(*map(range, kernel)):
                    place = tuple(a * s + o * d for a, s, o, d in zip(at, stride, offset, dilation, strict=True))
                    numbers.append(x[(slice(None), channel, *place)])
            groups_here.append(np.stack(numbers, -1))
        patches.append(np.stack(groups_here, 1))
    return np.stack(patches, 1)
