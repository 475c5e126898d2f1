"""Whether what a file adds is what its contract asks for: found when it is imported, before anything is measured.

Layer 1. A statistic, a family or a source that is not is a ContractError that names its file.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import is_dataclass
from types import ModuleType
from typing import Any, get_args

from pipeline.base_columns import BASE, is_of_units, unit_keys
from pipeline.columns import Column, DType
from pipeline.errors import CensusError, ContractError, is_machines_fault, nearest
from pipeline.texts import text_of


def offered(module: str, constant: str, contract: type, *, a_class: bool) -> Any:
    """What a module offers under a constant: None if nothing, ContractError if it is not what the contract asks for.

    `a_class` says whether the constant is a class of the contract, or one of its objects.
    """
    found, file = _imported(module), _file(module)
    given = getattr(found, constant, None)
    if given is None:
        if made := next(_made_in(found, contract), None):
            wanted = made.__name__ if a_class else f"{made.__name__}()"
            raise ContractError(f"{file}: {made.__name__} is not offered; expected {constant} = {wanted}")
        return None
    if not (inspect.isclass(given) and issubclass(given, contract) if a_class else isinstance(given, contract)):
        raise ContractError(f"{file}: {constant} = {given!r}: expected {_wanted(contract, a_class)}")
    name = module.rpartition(".")[2]
    if getattr(given, "name", None) != name:
        raise ContractError(
            f"{file}: {constant}.name = {getattr(given, 'name', None)!r}: expected {name!r}, as its file"
        )
    lacking = [one for one in _promised(contract) if not hasattr(given, one)]
    if missing := [*lacking, *sorted(getattr(given, "__abstractmethods__", ()))]:
        raise ContractError(f"{file}: {constant} has no {', '.join(missing)}: expected, as {contract.__name__} says")
    if type(version := getattr(given, "version", 1)) is not int:
        raise ContractError(f"{file}: {constant}.version = {version!r}: expected an integer")
    if is_dataclass(contract) and "__dataclass_fields__" not in vars(type(given)):
        raise ContractError(f"{file}: {type(given).__name__}: expected @dataclass(frozen=True) above it")
    return given


def _promised(contract: type) -> list[str]:
    """The names that a class declares of what derives from it."""
    return [name for name, kind in inspect.get_annotations(contract).items() if str(kind).startswith("ClassVar")]


def _imported(module: str) -> ModuleType:
    try:
        imported = importlib.import_module(module)
        text_of(module)  # before anybody edits it
        return imported
    except CensusError as error:
        raise ContractError(f"{_file(module)}: {error}") from error
    except (Exception, SystemExit) as error:
        raise raised_by(module, error, doing="cannot be imported") from error


@contextmanager
def asking_of(statistic: Any, what: str, site: Any) -> Iterator[None]:
    """Say of what a statistic raises in which file it is, and the line: ContractError."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, CensusError) or is_machines_fault(error):
            raise
        raise raised_by(type(statistic).__module__, error, doing=f"{what} of site {site.name}") from error


@contextmanager
def asking_primitives_of(statistics: Iterable[Any], site: Any) -> Iterator[None]:
    """Say the same of what comes out of the file of one of them, while none but its primitives is asked."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, CensusError) or is_machines_fault(error):
            raise
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        for module in dict.fromkeys(type(statistic).__module__ for statistic in statistics):
            if named := [frame.f_code.co_name for frame in frames if frame.f_globals.get("__name__") == module]:
                raise raised_by(module, error, doing=f"{named[0]}() of site {site.name}") from error
        raise


def primitives_of(statistic: Any, site: Any) -> Mapping[str, Any]:
    """What a statistic needs of a site, by name; ContractError where one is another value each time it is asked for.

    States are found again by their primitives.
    """
    with asking_of(statistic, "asked", site):
        first, again = (dict(statistic.primitives(site)) for _ in range(2))
    for name, one in first.items():
        if not _is_value(one, again.get(name)):
            raise unequal(statistic, site, name, one)
    return first


def _is_value(one: Any, again: Any) -> bool:
    try:
        return bool(one == again) and hash(one) == hash(again)
    except (TypeError, ValueError, RuntimeError):
        # a field that is a list has no hash, one that is an array is not equal or unequal
        return False


def unequal(statistic: Any, site: Any, name: str, primitive: Any) -> ContractError:
    """What is to be said of a primitive that is not equal to itself, made again."""
    kind = type(primitive).__name__
    return ContractError(
        f"{_file(type(statistic).__module__)}: asked of site {site.name}: primitive {name} is another {kind} each time "
        f"that it is made; expected @dataclass(frozen=True) above class {kind}, compared by fields that have a hash"
    )


def unfit_state(statistic: Any, site: Any, wrong: str) -> ContractError:
    """What is to be said of a state that is none of those that a statistic can have of a site."""
    file = _file(type(statistic).__module__)
    return ContractError(
        f"{file}: its state of site {site.name} {wrong}: expected of observe() and merge(), as of empty()"
    )


def raised_by(module: str, error: BaseException, *, doing: str) -> ContractError:
    """What is to be said of an error that came out of a file that was added, with the line of it."""
    # of a SyntaxError the place stands in front
    said = error.msg if isinstance(error, SyntaxError) else error
    return ContractError(f"{_place(module, error)}: {doing}: {type(error).__name__}: {said}")


def _place(module: str, error: BaseException) -> str:
    """The file of a module, and the line of it that an error came through last."""
    file = _origin(module)
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if file is not None and frame.filename == file]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    return f"{_file(module)}, line {line}" if line else _file(module)


def _origin(module: str) -> str | None:
    """The file of a module, which cannot be imported maybe; None of a notebook's."""
    if module in sys.modules:
        return getattr(sys.modules[module], "__file__", None)
    with suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(module)
        return None if spec is None else spec.origin
    return None


def _file(module: str) -> str:
    return f"{module.replace('.', '/')}.py"


def _made_in(module: ModuleType, contract: type) -> Iterator[type]:
    for value in vars(module).values():
        if inspect.isclass(value) and issubclass(value, contract) and value.__module__ == module.__name__:
            yield value


def _wanted(contract: type, a_class: bool) -> str:
    return (
        f"a class derived from {contract.__name__}"
        if a_class
        else f"an object of a class derived from {contract.__name__}"
    )


def refuse_unfit_columns(statistics: Iterable[Any]) -> None:
    """ContractError where the columns that statistics declare cannot stand beside one another, or in Parquet."""
    owners = dict.fromkeys((key.name for key in unit_keys("neurons")), "each row's key")
    types = {(table, column.name): column.dtype for table, columns in BASE.items() for column in columns}
    for statistic in statistics:
        file = _file(type(statistic).__module__)
        for column in statistic.COLUMNS:
            if not isinstance(column, Column):
                raise ContractError(f"{file}: COLUMNS has {column!r}: expected a Column")
            where = f"{file}: column {column.table}.{column.name}"
            if not (column.name.isidentifier() and column.table.isidentifier()):
                raise ContractError(f"{where}: expected letters, digits and _, no digit first")
            if not is_of_units(column.table):
                raise ContractError(f"{where}: {column.table} is no table of units; expected one of its own")
            if column.dtype not in get_args(DType):
                raise ContractError(f"{where}: dtype {column.dtype!r}: {nearest(str(column.dtype), get_args(DType))}")
            if column.se and column.table != "neurons":
                raise ContractError(f"{where}: se = True: expected of columns of neurons only")
            if (other := types.setdefault((column.table, column.name), column.dtype)) != column.dtype:
                raise ContractError(f"{where}: dtype {column.dtype!r}: {other!r} elsewhere")
            for name in _names(column) if column.table == "neurons" else ():
                if owner := owners.get(name):
                    raise ContractError(f"{where}: {name} is there already ({owner}); expected a name of its own")
                owners[name] = file


def _names(column: Column) -> list[str]:
    return [column.name, f"{column.name}_se"] if column.se else [column.name]
