"""What can be named in a job: every module of a package, imported in sorted order, offers one constant.

Layer 1: names packages as strings and imports nothing of the layers above. One file adds a statistic, a family or a
source; nothing is registered anywhere else.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from types import MappingProxyType
from typing import Any

_CONTRACT = "base"


@cache
def _found(package: str, constant: str) -> MappingProxyType[str, Any]:
    path = importlib.import_module(package).__path__
    names = sorted(module.name for module in pkgutil.iter_modules(path) if module.name != _CONTRACT)
    offered = {name: getattr(importlib.import_module(f"{package}.{name}"), constant, None) for name in names}
    return MappingProxyType({value.name: value for value in offered.values() if value is not None})


def statistics() -> MappingProxyType[str, Any]:
    """Every `Statistic`, with its default parameters, by name."""
    return _found("pipeline.statistics", "STATISTIC")


def families() -> MappingProxyType[str, Any]:
    """Every model `Family`, by name."""
    return _found("pipeline.models", "FAMILY")


def sources() -> MappingProxyType[str, Any]:
    """Every `Source` class, by name."""
    return _found("pipeline.sources", "SOURCE")
