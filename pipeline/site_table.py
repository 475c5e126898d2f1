"""The table `sites` of one model, as Arrow: every site, and every weight that is none.

Layer 2.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from pipeline.flow.discover import Discovery
from pipeline.sites import Site, Unread
from pipeline.tables import arrow_table, table_columns


def site_table(discovery: Discovery, *, run: str, model: str, data: str) -> pa.Table:
    """The table `sites` of one model: every site, and every weight that is none, with the reason."""
    rows = [*map(_site_row, discovery.sites), *map(_unread_row, discovery.unread)]
    names = list(dict.fromkeys(name for row in rows for name in row))
    values = {name: [row.get(name) for row in rows] for name in names}
    keys = {"run": run, "model": model, "data": data}
    return arrow_table("sites", table_columns([])["sites"], {**keys, **values})


def _site_row(site: Site) -> dict[str, Any]:
    return {
        "site": site.name,
        "position": site.index,
        "path": site.path,
        "call": site.call,
        "kind": site.kind,
        "gate": site.gate,
        "norm": site.norm,
        "folded": ", ".join(site.folded) or None,
        "alias_of": site.alias_of,
        "units": site.units,
        "fan_in": site.fan_in,
        "groups": site.groups,
        "input_kind": site.inputs.kind,
        "input_shape": list(site.inputs.shape),
        "upstream": [f"{site.inputs.upstream[at]}/{unit}" for at, unit in site.inputs.upstream_unit] or None,
        "receptive_field": [number for axis in site.inputs.field for number in axis] or None,
        "row_fraction": site.row_fraction,
        "input_names": list(site.inputs.names) or None,
        "interpreted": True,
        "reason": site.note,
        "parameters": site.raw_UD.numel(),
        "error": site.error,
    }


def _unread_row(unread: Unread) -> dict[str, Any]:
    return {
        "site": unread.name,
        "interpreted": False,
        "reason": unread.reason,
        "parameters": unread.parameters,
    }
