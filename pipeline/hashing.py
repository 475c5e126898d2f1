"""Digests of values and hashes of rows: the same on every machine, in every process, in torch and in NumPy.

Layer 0: imports nothing of the pipeline. Two kinds, never mixed: `digest` names things (SHA-256 over canonical JSON),
`splitmix64` draws rows at random (a bijection of 64-bit integers, so a sample needs no state and no order).
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

# only tensors' own operators are used: naming things must not cost the seconds that importing torch does
if TYPE_CHECKING:
    import torch

# Sebastiano Vigna, https://prng.di.unimi.it/splitmix64.c (public domain); Steele, Lea & Flood, OOPSLA 2014.
GAMMA = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB
MASK = (1 << 64) - 1


def digest(value: Any, *, length: int = 32) -> str:
    """Name a JSON value by the first `length` hex digits of the SHA-256 of its canonical form.

    Keys are sorted, no white space, floats by their shortest round-trip form; NaN and infinities are refused.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def sha256(content: bytes | memoryview) -> str:
    """SHA-256 of an object's bytes, 64 hex digits."""
    return hashlib.sha256(content).hexdigest()


def splitmix64(value: int) -> int:
    """One step of splitmix64 of a Python int, cleared of its sign bit: 0 ≤ result < 2⁶³.

    >>> splitmix64(0) == 0xE220A8397B1DCDAF & (2**63 - 1)
    True
    """
    z = (value + GAMMA) & MASK
    z = ((z ^ (z >> 30)) * MIX_1) & MASK
    z = ((z ^ (z >> 27)) * MIX_2) & MASK
    return (z ^ (z >> 31)) & (MASK >> 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(value: torch.Tensor, bits: int) -> torch.Tensor:
    # torch's >> on int64 is arithmetic; the hash needs the logical one
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def splitmix64_tensor(value: torch.Tensor) -> torch.Tensor:
    """`splitmix64` of every element of an int64 tensor (wrapping arithmetic): int64, 0 ≤ result < 2⁶³."""
    z = value + _signed(GAMMA)
    z = (z ^ _shift_right(z, 30)) * _signed(MIX_1)
    z = (z ^ _shift_right(z, 27)) * _signed(MIX_2)
    return (z ^ _shift_right(z, 31)) & ((1 << 63) - 1)


def row_hash(uid: torch.Tensor, *, seed: int, unit: torch.Tensor | int = 0) -> torch.Tensor:
    """Hash (seed, unit, row uid) to 63 bits: splitmix64(splitmix64(splitmix64(seed) + unit) ^ uid).

    `uid` and `unit` are int64 and broadcast; the result is int64 in [0, 2⁶³).
    """
    start = splitmix64(seed)
    if isinstance(unit, int):
        return splitmix64_tensor(uid ^ splitmix64((start + unit) & MASK))
    return splitmix64_tensor(splitmix64_tensor(unit + start) ^ uid)
