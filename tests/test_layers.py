"""The architecture as a test: imports go down the layers, never in a circle, and each heavy package has one door."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS: dict[str, int] = {
    **dict.fromkeys(
        [
            "allocator",
            "credentials",
            "counted",
            "errors",
            "grid",
            "names",
            "hashing",
            "columns",
            "batch",
            "progress",
            "selecting",
            "stopwatch",
        ],
        0,
    ),
    **dict.fromkeys(
        [
            "sites",
            "texts",
            "address",
            "flow",
            "forms",
            "kernels",
            "catalogue",
            "cell_parts",
            "cells",
            "claims",
            "answers",
            "aws_settings",
            "arrow_bytes",
            "compiler",
            "contracts",
            "declared",
            "devices",
            "attention",
            "base_columns",
            "input_forms",
            "inputs",
            "rows",
            "looked_over",
            "places",
            "parquet",
            "published",
            "executor",
            "filesystems",
            "job",
            "job_sections",
            "legible",
            "manifest",
            "marks",
            "misfits",
            "numerics",
            "registry",
            "schedule",
            "store",
            "tables",
            "whole_files",
            "withheld",
        ],
        1,
    ),
    **dict.fromkeys(
        [
            "cost",
            "fit",
            "foreign",
            "measure",
            "graphs",
            "running",
            "samples",
            "scores",
            "site_table",
            "statistics",
            "unit_tables",
            "models",
            "sources",
        ],
        2,
    ),
    **dict.fromkeys(
        [
            "resolve",
            "entries",
            "entry_models",
            "run_models",
            "plan",
            "estimate",
            "projection",
            "loading",
            "merging",
            "grouping",
            "described",
            "named",
            "origins",
            "site_parts",
            "sizes",
            "staging",
            "training",
            "measuring",
            "reduce",
            "jackknife",
            "pack",
            "task",
        ],
        3,
    ),
    **dict.fromkeys(["stage", "run", "runlog"], 4),
    **dict.fromkeys(["cluster", "gc", "needed", "query", "row", "show", "submission", "verify", "report"], 5),
    **dict.fromkeys(["cli", "operations", "options", "flows"], 6),
}
# a sibling of these imports only its `base` among them
FAMILIES = ("statistics", "models", "sources")
DOORS = {
    "ray": {"pipeline/cluster/"},
    "prefect": {"flows/"},
    "fsspec": {"pipeline/filesystems.py", "pipeline/published.py"},
    "s3fs": {"pipeline/filesystems.py"},
    "duckdb": {"pipeline/query.py"},
}


def modules() -> dict[str, Path]:
    paths = [*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("flows/**/*.py")]
    return {str(path.relative_to(ROOT)): path for path in paths}


def imported(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(name: str) -> str:
    """The part of the architecture that a dotted module name or a path belongs to."""
    parts = name.removesuffix(".py").replace("/", ".").split(".")
    return parts[1] if parts[0] == "pipeline" and len(parts) > 1 else parts[0]


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_go_down(name: str) -> None:
    own = room(name)
    if own == "__init__" and name.startswith("pipeline"):
        return
    assert own in LAYERS, f"{name}: say in which layer {own} is"
    for target in imported(modules()[name]):
        if target.startswith(("pipeline.", "flows.")) and room(target) in LAYERS:
            assert LAYERS[room(target)] <= LAYERS[own], f"{name} (layer {LAYERS[own]}) imports {target}"
        family = next((one for one in FAMILIES if own == one), None)
        if family and target.startswith(f"pipeline.{family}."):
            assert target.split(".")[2] == "base", f"{name} imports its sibling {target}"


def test_imports_make_no_circle() -> None:
    known = {
        name.removesuffix(".py").replace("/", ".").removesuffix(".__init__"): path for name, path in modules().items()
    }
    graph = {
        name: {target for target in imported(path) if target in known and target != name}
        for name, path in known.items()
    }
    assert len(list(TopologicalSorter(graph).static_order())) == len(known)


@pytest.mark.parametrize("package", sorted(DOORS))
def test_each_heavy_package_has_one_door(package: str) -> None:
    users = {name for name, path in modules().items() if any(t.split(".")[0] == package for t in imported(path))}
    assert all(any(user.startswith(door) for door in DOORS[package]) for user in users), users


def test_statistics_and_kernels_do_no_io() -> None:
    for name, path in modules().items():
        if room(name) in {"statistics", "kernels"}:
            outside = {target.split(".")[0] for target in imported(path)} & {"pyarrow", "os", "pathlib", "io", "duckdb"}
            assert not outside, f"{name} imports {outside}"
