"""The laws of every statistic, as functions that raise AssertionError: `law(statistic, shown, random)`.

`shown` are all presentations of a site; `random` draws splits and orders. A statistic that keeps the laws gives the
same numbers for any split, order and merge tree of its data, and those of its definition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save

from pipeline.cells import misfit
from pipeline.kernels.base import State
from pipeline.site_parts import ABREAST
from pipeline.sites import Presentations, Site
from pipeline.statistics.base import Controls, Nullable, Rows, Statistic
from tests.laws.drawn import permuted, permuted_site, reordered, split
from tests.laws.tolerances import RELATIVE, VECTOR_TOLERANCES, Scales, tolerance


# What tables.py declares: whose row it is.
def is_key(table: str, name: str) -> bool:
    return name == "unit" and table != "neurons"


Law = Callable[[Statistic, Presentations, np.random.Generator], None]

# Columns whose values are units, to be renamed with them.
UNIT_COLUMNS = {"unit", "neighbour_unit"}
# Rows that are drawn by a hash of the unit's number: they are others when units are renamed.
DRAWN_BY_UNIT: dict[str, Callable[[dict[str, Any]], bool]] = {
    "exemplars": lambda row: row["kind"] in ("random", "octave"),
}
# Columns drawn by a hash of the unit's number, or that follow from which of equals has the lowest number.
DRAWN_COLUMNS = {"redundancy_unit", "redundancy_r", "redundancy_lift"}
# Names of float state tensors that hold choices, not sums.
EXACT_STATES = {"min", "max", "z", "a", "match"}
DTYPES = {
    "int32": torch.int64,
    "int64": torch.int64,
    "float32": torch.float32,
    "float64": torch.float64,
    "bool": torch.bool,
}


def controls_of(site: Site) -> Controls:
    """A twin with other patterns."""
    pattern_UD = site.pattern_UD.flip(1) + 0.5
    return Controls(twin=replace(site, pattern_UD=pattern_UD, raw_UD=pattern_UD))


def observed(statistic: Statistic, pieces: Sequence[Presentations], site: Site) -> State:
    """The one update path: state = merge(state, observe(batch))."""
    seen = (statistic.observe(piece) for piece in pieces)
    return reduce(lambda state, new: statistic.merge(site, state, new), seen, statistic.empty(site))


def law_oracle(statistic: Statistic, shown: Presentations, random: np.random.Generator) -> None:
    """columns(observe(all)) = define(all)."""
    site, controls = shown.site, controls_of(shown.site)
    found = statistic.columns(site, observed(statistic, [shown], site), controls)
    assert_same_rows(statistic, found, statistic.define(site, shown, controls), shown)


def law_oracle_of_parts(statistic: Statistic, shown: Presentations, random: np.random.Generator) -> None:
    """columns(merged parts) = define(all)."""
    site, controls = shown.site, controls_of(shown.site)
    found = statistic.columns(site, observed(statistic, _pieces(shown, random), site), controls)
    assert_same_rows(statistic, found, statistic.define(site, shown, controls), shown)


def law_partition(statistic: Statistic, shown: Presentations, random: np.random.Generator) -> None:
    """Any split gives the state of one pass, integers and choices to the last bit."""
    site = shown.site
    once, parts = statistic.observe(shown), observed(statistic, _pieces(shown, random), site)
    assert_same_choices(once, parts)
    assert_same_columns(statistic, once, parts, shown)


def law_identity(statistic: Statistic, shown: Presentations, random: np.random.Generator) -> None:
    """Merging with the empty state, on either side, changes nothing."""
    site, state = shown.site, statistic.observe(shown)
    assert_same_bits(statistic.merge(site, statistic.empty(site), state), state)
    assert_same_bits(statistic.merge(site, state, statistic.empty(site)), state)
    nothing = statistic.observe(shown.select_rows(torch.zeros(shown.rows, dtype=torch.bool)))
    assert_same_bits(statistic.merge(site, nothing, state), state)
    assert_same_bits(statistic.merge(site, state, nothing), state)


def law_row_order(statistic: Statistic, shown: Presentations, random: np.random.Generator) -> None:
    """The order of the rows in a batch does not matter."""
    other = reordered(shown, torch.as_tensor(random.permutation(shown.rows)))
    left, right = statistic.observe(shown), statistic.observe(other)
    assert_same_choices(left, right)
    assert_same_columns(statistic, left, right, shown)


def law_merge_order(statistic: Statistic, shown: Presentations, random: np.random.Generator) -> None:
    """The order in which states are merged does not matter."""
    site = shown.site
    states = [statistic.observe(piece) for piece in _pieces(shown, random)]
    merge = lambda left, right: statistic.merge(site, left, right)  # noqa: E731
    forth, back = reduce(merge, states), reduce(merge, reversed(states))
    assert_same_choices(forth, back)
    assert_same_columns(statistic, forth, back, shown)


def law_tree(statistic: Statistic, shown: Presentations, random: np.random.Generator) -> None:
    """A tree of merges gives what a chain gives."""
    site = shown.site
    states = [statistic.observe(piece) for piece in _pieces(shown, random)]
    chain = reduce(lambda left, right: statistic.merge(site, left, right), states)
    while len(states) > 1:
        pairs = zip(states[::2], states[1::2], strict=False)
        states = [statistic.merge(site, *pair) for pair in pairs] + states[len(states) - len(states) % 2 :]
    assert_same_choices(chain, states[0])
    assert_same_columns(statistic, chain, states[0], shown)


def law_unit_permutation(statistic: Statistic, shown: Presentations, random: np.random.Generator) -> None:
    """Renaming the units renames the rows and changes nothing else."""
    site = shown.site
    per_group = site.units // site.groups
    order_U = torch.cat(
        [group * per_group + torch.as_tensor(random.permutation(per_group)) for group in range(site.groups)]
    )
    found = statistic.columns(site, statistic.observe(shown), controls_of(site))
    other, controls = permuted(shown, order_U), controls_of(site)
    controls = Controls(twin=permuted_site(controls.twin, order_U))
    renamed = statistic.columns(other.site, statistic.observe(other), controls)
    # with one input all patterns point the same way or its opposite: which one is nearest is a tie
    tied = UNIT_COLUMNS - {"unit"} if site.fan_in == 1 else set()
    assert_same_rows(statistic, _rows_renamed(renamed, order_U, tied), _undrawn(found, tied), shown)


def law_parts(statistic: Statistic, shown: Presentations, random: np.random.Generator) -> None:
    """Some of the units alone, where a statistic lets them be cut out, have what they have among all."""
    site = shown.site
    together = statistic.rows_together(site) if site.groups == 1 else None
    if together is None:
        return
    states = [statistic.observe(piece) for piece in _pieces(shown, random)]
    merged, controls = reduce(lambda left, right: statistic.merge(site, left, right), states), controls_of(site)
    judged = []
    for part in _parts(site, int(random.integers(1, site.units + 1))):
        cut = [_of_units(state, site, part) for state in states]
        alone = reduce(lambda left, right, part=part: statistic.merge(part, left, right), cut)  # type: ignore[misc]
        assert_same_bits(alone, _of_units(merged, site, part))
        judged.append(statistic.estimates(part, alone, _beside(controls, part)))
    whole = statistic.estimates(site, merged, controls)
    for column in statistic.COLUMNS:
        if column.se and column.name in whole:
            found = [value for part in judged for value in plain(part[column.name])]
            assert _equal(torch.tensor(found), torch.tensor(plain(whole[column.name]))), column.name
    step = together * int(random.integers(1, -(-site.units // together) + 1))
    _assert_same_of_parts(statistic, merged, _parts(site, step), shown)
    # such parts as the pipeline makes have the same bits
    abreast = together if together > 1 else ABREAST
    for exact in range(abreast, site.units, abreast):
        _assert_same_of_parts(statistic, merged, _parts(site, exact), shown, to_the_bit=True)


def law_estimates(statistic: Statistic, shown: Presentations, random: np.random.Generator) -> None:
    """What has a standard error is estimated as it stands in its column."""
    site, state, controls = shown.site, statistic.observe(shown), controls_of(shown.site)
    estimates = statistic.estimates(site, state, controls)
    neurons = statistic.columns(site, state, controls).get("neurons", {})
    for name in [column.name for column in statistic.COLUMNS if column.se]:
        assert (name in estimates) == (name in neurons), f"{name}: either estimated or a column, not both"
        found, wanted = ([repr(one) for one in plain(of.get(name, []))] for of in (estimates, neurons))
        assert found == wanted, f"{name}: {found} is not {wanted}"


def law_primitives(statistic: Statistic, shown: Presentations, random: np.random.Generator) -> None:
    """What is asked of a site is a value: equal, with an equal hash, whenever it is asked for."""
    first, again = statistic.primitives(shown.site), statistic.primitives(shown.site)
    assert first == again
    assert {name: hash(one) for name, one in first.items()} == {name: hash(one) for name, one in again.items()}


def law_encoding(statistic: Statistic, shown: Presentations, random: np.random.Generator) -> None:
    """A stored state comes back bit for bit."""
    state = statistic.observe(shown)
    assert_same_bits(load(save({name: value.contiguous() for name, value in state.items()})), state)


def law_purity(statistic: Statistic, shown: Presentations, random: np.random.Generator) -> None:
    """No argument is changed, and the same arguments give the same bits."""
    site = shown.site
    before = [None if value is None else value.clone() for value in _tensors(shown)]
    state = statistic.observe(shown)
    assert_same_bits(statistic.observe(shown), state)
    kept = {name: value.clone() for name, value in state.items()}
    merged = statistic.merge(site, state, state)
    assert_same_bits(statistic.merge(site, state, state), merged)
    again = {name: value.clone() for name, value in merged.items()}
    statistic.merge(site, merged, state)
    statistic.columns(site, merged, controls_of(site))
    assert_same_bits(merged, again)
    assert_same_bits(state, kept)
    assert all(_equal(old, new) for old, new in zip(before, _tensors(shown), strict=True)), "an input was changed"


def law_state_bytes(statistic: Statistic, shown: Presentations, random: np.random.Generator) -> None:
    """A state takes what is said of it, which is what that of no data holds: more only where it grows."""
    site = shown.site
    forms, said = statistic.forms(site), statistic.state_bytes(site, shown.classes)
    grows = len(forms) > 1 or any(0 in value.shape for value in forms[0].values())
    for state in (
        statistic.empty(site),
        statistic.observe(shown),
        statistic.merge(site, *[statistic.observe(shown)] * 2),
    ):
        assert misfit(state, *forms) is None, misfit(state, *forms)
        held = sum(value.nbytes for value in state.values())
        assert grows or held == said, f"{held} bytes, not {said}"
    assert said >= sum(value.nbytes for value in forms[0].values())


def law_dtypes(statistic: Statistic, shown: Presentations, random: np.random.Generator) -> None:
    """Counts are int64, or int32 while they fit, sums float64, and each column is declared and has its type."""
    site, state = shown.site, statistic.observe(shown)
    assert {name: value.dtype for name, value in state.items()} == {
        name: value.dtype for name, value in statistic.empty(site).items()
    }
    assert {value.dtype for value in state.values()} <= {torch.int32, torch.int64, torch.float64}
    declared = {(column.table, column.name): column.dtype for column in statistic.COLUMNS}
    for table, columns in statistic.columns(site, state, controls_of(site)).items():
        for name, values in columns.items():
            if is_key(table, name):
                continue
            assert (table, name) in declared, f"{table}.{name} is not declared"
            _assert_dtype(declared[table, name], values, f"{table}.{name}")
        if table == "neurons":
            assert all(len(plain(values)) == site.units for values in columns.values())


LAWS: dict[str, Law] = {
    name.removeprefix("law_"): law for name, law in list(globals().items()) if name.startswith("law_")
}


def assert_same_bits(left: State, right: State) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert _equal(left[name], right[name]), f"{name}: {left[name]} is not {right[name]}"


def assert_same_choices(left: State, right: State) -> None:
    """Integers, extremes and what was chosen agree exactly."""
    assert left.keys() == right.keys()
    for name in left:
        if not left[name].is_floating_point() or name.rsplit(".", 1)[-1] in EXACT_STATES:
            assert _equal(left[name], right[name]), f"{name}: {left[name]} is not {right[name]}"


def assert_same_columns(statistic: Statistic, left: State, right: State, shown: Presentations) -> None:
    site, controls = shown.site, controls_of(shown.site)
    columns = [statistic.columns(site, state, controls) for state in (left, right)]
    assert_same_rows(statistic, *columns, shown)


def assert_same_rows(statistic: Statistic, found: Rows, wanted: Rows, shown: Presentations) -> None:
    """Equal tables, up to the order of rows and the tolerance of each column."""
    assert {table for table in found if found[table]} == {table for table in wanted if wanted[table]}
    scales = Scales(shown)
    for table in found:
        assert found[table].keys() == wanted[table].keys(), f"{table}: {found[table].keys() ^ wanted[table].keys()}"
        left, right = _sorted(_listed(found[table])), _sorted(_listed(wanted[table]))
        assert len(left) == len(right), f"{table}: {len(left)} rows, not {len(right)}"
        for name in found[table]:
            _assert_column(f"{table}.{name}", [row[name] for row in left], [row[name] for row in right],
                           [row["unit"] for row in left], scales)  # fmt: skip


def _assert_column(name: str, left: list, right: list, unit: list, scales: Scales) -> None:
    short = name.split(".")[1]
    if any(isinstance(value, float) for value in left + right):
        assert [value is None for value in left] == [value is None for value in right], f"{name}: nulls differ"
        shown = [index for index, value in enumerate(left) if value is not None]
        ours, theirs = (np.array([values[index] for index in shown], dtype=float) for values in (left, right))
        allowed = tolerance(short, theirs, np.array(unit)[shown], scales)
        same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs)) | (np.abs(ours - theirs) <= allowed)
        assert same.all(), f"{name}: {ours[~same]} is not {theirs[~same]} to {allowed[~same]}"
    elif any(isinstance(value, np.ndarray) for value in left + right):
        allowed, least = VECTOR_TOLERANCES.get(short, RELATIVE), scales.x if short == "mean_x" else 0.0
        for ours, theirs in zip(left, right, strict=True):
            assert _same_vector(ours, theirs, allowed, least=least), f"{name}: {ours} is not {theirs}"
    else:
        assert left == right, f"{name}: {left} is not {right}"


def _same_vector(ours: np.ndarray | None, theirs: np.ndarray | None, allowed: float, *, least: float) -> bool:
    """Within `allowed` of the length of theirs, or of `least` if that is more."""
    if ours is None or theirs is None:
        return ours is theirs
    if ours.shape != theirs.shape or not np.array_equal(np.isnan(ours), np.isnan(theirs)):
        return False
    difference = np.nan_to_num(ours.astype(float) - theirs.astype(float))
    return bool(np.linalg.norm(difference) <= allowed * max(np.linalg.norm(np.nan_to_num(theirs.astype(float))), least))


def _listed(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A table as rows of plain values; null is None."""
    lists = {name: plain(values) for name, values in columns.items()}
    rows = len(next(iter(lists.values()), []))
    return [{"unit": index, **{name: values[index] for name, values in lists.items()}} for index in range(rows)]


def plain(values: Any) -> list:
    """A column as plain values; null is None."""
    if isinstance(values, Nullable):
        pairs = zip(values.values.tolist(), values.valid.tolist(), strict=True)
        return [value if valid else None for value, valid in pairs]
    if isinstance(values, torch.Tensor) and values.ndim == 1:
        return values.tolist()
    return [value.numpy() if isinstance(value, torch.Tensor) else value for value in values]


def _sorted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def key(row: dict[str, Any]) -> list:
        names = sorted(name for name in row if name != "unit" and isinstance(row[name], int | str))
        return [row["unit"], *(repr(row[name]).zfill(24) for name in names)]

    return sorted(rows, key=key)


def _rows_renamed(rows: Rows, order_U: torch.Tensor, left_out: set[str]) -> dict[str, dict[str, Any]]:
    """The tables of permuted units under the units' first names: unit i of these is unit order_U[i]."""
    back_U = torch.argsort(order_U)
    renamed: dict[str, dict[str, Any]] = {}
    for table, columns in _undrawn(rows, left_out).items():
        named = {name: _renamed(name, values, order_U) for name, values in columns.items()}
        renamed[table] = (
            {name: _picked(values, back_U) for name, values in named.items()} if table == "neurons" else named
        )
    return renamed


def _renamed(name: str, values: Any, order_U: torch.Tensor) -> Any:
    if name not in UNIT_COLUMNS:
        return values
    if isinstance(values, Nullable):
        return Nullable(order_U[values.values.clamp(min=0)], values.valid)
    return order_U[values]


def _picked(values: Any, index: torch.Tensor) -> Any:
    if isinstance(values, Nullable):
        return Nullable(values.values[index], values.valid[index])
    return values[index] if isinstance(values, torch.Tensor) else [values[one] for one in index.tolist()]


def _undrawn(rows: Rows, left_out: set[str]) -> dict[str, dict[str, Any]]:
    """The tables without what is drawn by a hash of the unit's number, and without the columns `left_out`."""
    kept: dict[str, dict[str, Any]] = {}
    for table, columns in rows.items():
        kept[table] = {name: values for name, values in columns.items() if name not in DRAWN_COLUMNS | left_out}
        if table in DRAWN_BY_UNIT and columns:
            listed = _listed(columns)
            index = torch.tensor(
                [i for i, row in enumerate(listed) if not DRAWN_BY_UNIT[table](row)], dtype=torch.int64
            )
            kept[table] = {name: _picked(values, index) for name, values in kept[table].items()}
    return kept


def _pieces(shown: Presentations, random: np.random.Generator) -> list[Presentations]:
    """An uneven split into two to four pieces with rows, and at least one without any."""
    weights = random.dirichlet([0.4] * 4)
    piece_N = torch.as_tensor(random.choice(4, shown.rows, p=weights))
    if shown.rows > 1:
        # a split that leaves all rows together would prove nothing
        fixed = max(1, shown.rows // 4)
        piece_N[:fixed], piece_N[-fixed:] = 0, 1
    return [*split(shown, piece_N), shown.select_rows(torch.zeros(shown.rows, dtype=torch.bool))]


def _parts(site: Site, step: int) -> list[Site]:
    return [site.part(first, min(first + step, site.units)) for first in range(0, site.units, step)]


def _beside(controls: Controls, part: Site) -> Controls:
    assert controls.twin is not None
    return Controls(twin=controls.twin.part(part.first, part.first + part.units))


def _assert_same_of_parts(
    statistic: Statistic, state: State, parts: Sequence[Site], shown: Presentations, *, to_the_bit: bool = False
) -> None:
    """The rows of all parts, one after the other and numbered on, are those of all units in every table."""
    site, controls = shown.site, controls_of(shown.site)
    every = {table: _listed(columns) for table, columns in statistic.columns(site, state, controls).items()}
    found: dict[str, list[dict[str, Any]]] = {table: [] for table in every}
    for part in parts:
        made = statistic.columns(part, _of_units(state, site, part), _beside(controls, part))
        for table, columns in made.items():
            rows = [{**row, "unit": row["unit"] + part.first} for row in _listed(columns)]
            found.setdefault(table, []).extend(rows)
    for table, rows in found.items():
        units, wanted = ([row["unit"] for row in one] for one in (rows, every.get(table, [])))
        assert units == wanted, f"{table}: rows of units {units} in parts, {wanted} among all"
        columns = {tuple(row) for row in [*rows, *every.get(table, [])]}
        assert len(columns) < 2, f"{table}: other columns in parts than among all: {columns}"
    assert_same_rows(statistic, _by_column(found), _by_column(every), shown)
    if to_the_bit:
        for table, rows in found.items():
            for ours, theirs in zip(rows, every[table], strict=True):
                differ = [name for name in ours if repr(_bits(ours[name])) != repr(_bits(theirs[name]))]
                assert not differ, f"{table}, unit {ours['unit']}: other bits in a part in {', '.join(differ)}"


def _by_column(rows: Mapping[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    return {table: {name: [row[name] for row in of] for name in of[0]} for table, of in rows.items() if of}


def _bits(value: Any) -> Any:
    return value.tobytes() if isinstance(value, np.ndarray) else value


def _of_units(state: State, site: Site, part: Site) -> State:
    rows = slice(part.first, part.first + part.units)
    return {name: value[rows] if value.shape[:1] == (site.units,) else value for name, value in state.items()}


def _tensors(shown: Presentations) -> list[torch.Tensor | None]:
    sums = shown.input_sums()
    return [
        shown.z_LSU, shown.a_LSU, shown.affine_LSU, shown.uid_N, shown.label_N, shown.row_L, shown.mask_LS,
        shown.position_LS, shown.patches(0, shown.entries), sums.sum_LSG, sums.square_LSG, sums.centred_LSG,
        shown.site.pattern_UD, shown.site.bias_U, shown.gradient_LSU, shown.label_LS,
    ]  # fmt: skip


def _equal(left: torch.Tensor | None, right: torch.Tensor | None) -> bool:
    if left is None or right is None:
        return left is right
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return bool(((left == right) | ((left != left) & (right != right))).all())


def _assert_dtype(dtype: str, values: Any, name: str) -> None:
    if isinstance(values, Nullable):
        assert values.valid.dtype == torch.bool, name
        values = values.values
    if dtype == "string":
        assert isinstance(values, list), name
        assert all(isinstance(value, str) for value in values), name
    elif dtype.startswith("list<"):
        wanted = DTYPES[dtype[5:-1]]
        assert all(value.dtype == wanted and value.ndim == 1 for value in values if value is not None), name
    else:
        assert isinstance(values, torch.Tensor), name
        assert values.dtype == DTYPES[dtype], f"{name}: {values.dtype} for {dtype}"
