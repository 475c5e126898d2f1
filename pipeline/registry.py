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

from pipeline.contracts import offered, refuse_unfit_columns

_CONTRACT = "base"


@cache
def _found(package: str, constant: str, *, a_class: bool = False) -> MappingProxyType[str, Any]:
    contract = getattr(importlib.import_module(f"{package}.{_CONTRACT}"), constant.title())
    path = importlib.import_module(package).__path__
    names = sorted(module.name for module in pkgutil.iter_modules(path) if module.name != _CONTRACT)
    found = {name: offered(f"{package}.{name}", constant, contract, a_class=a_class) for name in names}
    return MappingProxyType({name: value for name, value in found.items() if value is not None})


@cache
def statistics() -> MappingProxyType[str, Any]:
    """Every `Statistic`, with its default parameters, by name; ContractError where one is not as it must be."""
    found = _found("pipeline.statistics", "STATISTIC")
    refuse_unfit_columns(found.values())
    return found


def families() -> MappingProxyType[str, Any]:
    """Every model `Family`, by name; ContractError where one is not as it must be."""
    return _found("pipeline.models", "FAMILY")


def sources() -> MappingProxyType[str, Any]:
    """Every `Source` class, by name; ContractError where one is not as it must be."""
    return _found("pipeline.sources", "SOURCE", a_class=True)
