"""What is wrong with an added statistic, family or source is one message, before anything is measured or written."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

import pipeline.models
import pipeline.sources
import pipeline.statistics
from pipeline import registry
from pipeline.cli import cli
from pipeline.errors import ContractError, JobError, StoreError
from pipeline.executor import InlineExecutor
from pipeline.job import Job, load_job
from pipeline.manifest import manifest_key
from pipeline.measure import measure
from pipeline.resolve import resolve
from pipeline.run import run
from pipeline.store import open_store
from pipeline.texts import refuse_other_texts, text_of
from tests.laws.drawn import draw
from tests.laws.laws import law_primitives
from tests.laws.test_laws import NAMED

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
(STATISTIC,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "STATISTIC = " in block]
FAMILY = """
from torch import nn
from pipeline.models.base import Family, Hyperparameters
class Line(Family):
    name, version, parameters = "added", 1, Hyperparameters
    def build(self, parameters, task): return nn.Linear(task.shape[0], task.outputs)
FAMILY = Line()
"""
SOURCE = """
from pipeline.sources.base import FileSource
class Rows(FileSource):
    name = "added"
SOURCE = Rows
"""
PLACES = {
    "statistics": (pipeline.statistics, "variation", STATISTIC),
    "families": (pipeline.models, "added", FAMILY),
    "sources": (pipeline.sources, "added", SOURCE),
}
Add = Callable[..., Any]


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Add]:
    """Write a file beside those of a kind, with something in it replaced, and ask the registry for all of the kind."""
    added: list[str] = []
    # a file written anew within the second would be taken for the one that was compiled
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(kind: str, *replaced: tuple[str, str]) -> Any:
        package, name, source = PLACES[kind]
        for old, new in replaced:
            assert old in source
            source = source.replace(old, new)
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
        added.append(f"{package.__name__}.{name}")
        forget(added)
        return getattr(registry, kind)()[name]

    yield write
    forget(added)


def forget(modules: Iterable[str]) -> None:
    for name in modules:
        sys.modules.pop(name, None)
    text_of.cache_clear()
    registry.statistics.cache_clear()
    registry._found.cache_clear()


@pytest.mark.parametrize("kind", PLACES)
def test_a_file_adds_one(add: Add, kind: str) -> None:
    assert add(kind).name == PLACES[kind][1]


VALUES = 'spread_U / (z["absolute"] / z["n"].double())'
DECLARED = '"variation",\n            "float64",'


@pytest.mark.parametrize(
    ("kind", "old", "new", "said"),
    [
        (
            "statistics",
            "import numpy as np",
            "import numpyy as np",
            ", line 8: cannot be imported: ModuleNotFoundError",
        ),
        ("statistics", "STATISTIC = ", "STATISTICS = ", "Variation is not offered; expected STATISTIC = Variation()"),
        ("statistics", "Variation()", "Variation", "expected an object of a class derived from Statistic"),
        ("statistics", 'name = "variation"', 'name = "response"', "STATISTIC.name = 'response': expected 'variation'"),
        (
            "statistics",
            "    def define",
            "    def defined",
            "cannot be imported: TypeError: Can't instantiate abstract",
        ),
        ("statistics", "(frozen=True)", "", "cannot be imported: TypeError: cannot inherit non-frozen dataclass"),
        ("statistics", "@dataclass(frozen=True)\n", "", "Variation: expected @dataclass(frozen=True) above it"),
        ("statistics", "    version = 1\n", "", "STATISTIC has no version: expected, as Statistic says"),
        ("families", "name, version, parameters", "name, version, hyperparameters", "FAMILY has no parameters"),
        ("statistics", DECLARED, '"variation",\n"float65",', "dtype 'float65': did you mean 'float64'?"),
        (
            "statistics",
            DECLARED,
            '"fire_rate",\n"float64",',
            "fire_rate is there already (pipeline/statistics/response.py)",
        ),
        (
            "statistics",
            DECLARED,
            '"the share, \\"x",\n"float64",',
            'column neurons.the share, "x: expected letters, digi',
        ),
        (
            "statistics",
            "se=True,",
            'table="sites",',
            "column sites.variation: sites is no table of units; expected one",
        ),
        ("statistics", "COLUMNS = (", "COLUMNS = ('n',", "COLUMNS has 'n': expected a Column"),
        ("statistics", "version = 1", 'version = "1"', "STATISTIC.version = '1': expected an integer"),
        ("families", '"added", 1,', '"added", 1.5,', "FAMILY.version = 1.5: expected an integer"),
        ("statistics", DECLARED, '"unit",\n"float64",', "column neurons.unit: dtype 'float64': 'int32' elsewhere"),
        ("statistics", "se=True,", 'se=True, table="classes",', "expected of columns of neurons only"),
        ("families", "FAMILY = Line()", "", "Line is not offered; expected FAMILY = Line()"),
        ("families", '"added"', '"mlp"', "FAMILY.name = 'mlp': expected 'added', as its file"),
        ("sources", "FileSource", "Source", "SOURCE has no chunks, classes, read, shape, splits: expected, as Source"),
        ("sources", "SOURCE = Rows", "SOURCE = Rows.name", "expected a class derived from Source"),
        ("sources", "(FileSource)", "(FileSource", ", line 3: cannot be imported: SyntaxError: "),
    ],
)
def test_what_is_wrong_is_said_with_its_file(add: Add, kind: str, old: str, new: str, said: str) -> None:
    package, name, _ = PLACES[kind]
    with pytest.raises(ContractError) as refused:
        add(kind, (old, new))
    assert str(refused.value).startswith(f"{package.__name__.replace('.', '/')}/{name}.py")
    assert said in str(refused.value)


def test_the_command_line_says_it_without_a_traceback(add: Add) -> None:
    with pytest.raises(ContractError):
        add("statistics", (DECLARED, '"fire_rate",\n"float64",'))
    answer = CliRunner().invoke(cli, ["tables", "neurons"])
    assert answer.exit_code == 2
    assert answer.output.startswith("error: pipeline/statistics/variation.py: column neurons.fire_rate")
    assert answer.output.count("\n") == 1


GIVEN = 'return {"neurons"'
UNITS = "torch.tensor([0, 1])"
CLASS = {"class": "torch.tensor([0, 0])"}


def table(name: str, **columns: str) -> str:
    """In place of `GIVEN`: rows of another table in front."""
    return (
        f"return {{'{name}': {{{', '.join(f'{column!r}: {values}' for column, values in columns.items())}}}, 'neurons'"
    )


classes = partial(table, "classes")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            VALUES,
            f"({VALUES})[:-1]",
            "expected as many values of each column: 2 of the units of the site, 1 of neurons",
        ),
        (VALUES, f"({VALUES})[:, None]", "got a tensor of shape (2, 1); expected 1 axis"),
        (VALUES, f"({VALUES}).mean()", "got a tensor of shape (); expected 1 axis"),
        (VALUES, f"({VALUES}).float()", "got torch.float32, declared as float64: digits are lost"),
        (VALUES, f"({VALUES}).long()", "got torch.int64, declared as float64"),
        (VALUES, f"({VALUES}).numpy()", "got ndarray; expected a tensor, Nullable or a list"),
        (
            '{"variation": spread',
            '{"variaton": spread',
            "declares no column neurons.variaton; did you mean 'variation'?",
        ),
        ('{"neurons": {"variation": spread', '{"neuron": {"variation": spread', "no column neuron.variation; none is"),
        (
            GIVEN,
            "return {}\n        #",
            "column neurons.variation is not given; expected values: of when it is null it",
        ),
        (GIVEN, 'return {"neurons": {}}\n        #', "column neurons.variation is not given; expected values"),
        (GIVEN, classes(), "column classes.unit is not given; expected values"),
        (GIVEN, classes(unit=UNITS), "column classes.class is not given; expected values"),
        (GIVEN, classes(**CLASS, unit="torch.tensor([1, 2])"), "classes.unit: got 1 to 2; expected 0 to 1, the units"),
        (GIVEN, classes(**CLASS, unit="torch.tensor([-1, 0])"), "classes.unit: got -1 to 0; expected 0 to 1, the"),
        (GIVEN, classes(**CLASS, unit="[0, 1]"), "column classes.unit: got list; expected a tensor"),
        (GIVEN, classes(**CLASS, unit=UNITS, site="['a', 'b']"), "no column classes.site; none is"),
        (GIVEN, "return None\n        #", "columns() gives NoneType; expected values by column by table"),
        (GIVEN, 'return {"neurons": None}\n        #', "columns() gives a table that is none; expected values by"),
        ('"float64",\n            "Stand', '"string",\n            "Stand', "got torch.float64, declared as string"),
        (VALUES, f"({VALUES}).tolist() and ['a', 1.5]", "neurons.variation: declared as float64: "),
        (VALUES, f"(({VALUES}), torch.tensor([True]))", "neurons.variation: got 2 values, of which 1 are said to be"),
        (VALUES, f"(({VALUES}), [True, False])", "variation: got a tuple; expected Nullable, its valid a tensor of"),
        (
            GIVEN,
            classes(**{"class": "torch.tensor([0, 2**31])"}, unit=UNITS),
            "class: declared as int32: Integer value",
        ),
        (GIVEN, table("exemplars", unit=UNITS, rank=UNITS, kind="[1, 2]"), "exemplars.kind: declared as string: "),
        (GIVEN, table("sites", units=UNITS), "rows of sites, which is no table of units; expected"),
    ],
)
def test_rows_are_as_declared(add: Add, old: str, new: str, said: str) -> None:
    statistic = add("statistics", (old, new))
    with pytest.raises(ContractError, match=r"^statistic variation at site ") as refused:
        measure(torch.nn.Linear(3, 2), torch.randn(20, 3).split(8), statistics=[statistic])
    assert said in str(refused.value)


ADDED = """
name = "added"
[data.digits]
source = "digits"
[[models]]
family = "added"
data = "digits"
training = { steps = 2 }
[statistics.response]
"""
BUILT = "nn.Sequential(nn.Flatten(), nn.Linear(64, task.outputs))"


@pytest.mark.parametrize(
    ("built", "said"),
    [
        (BUILT, None),
        (
            BUILT.replace("64", "65"),
            r"it does not run on rows of shape \(1, 8, 8\): RuntimeError: .*65, 10",
        ),
        (BUILT.replace("outputs", "outputs + 1"), r"gives a Tensor of shape \(2, 11\): expected scores of \(2, 10\)$"),
        (BUILT[:-1] + ", nn.GRU(10, 10))", r"of 2 rows it gives a tuple of shape \(\): expected scores of \(2, 10\)$"),
        ("None", "family added builds NoneType: expected a torch.nn.Module"),
        ("1 / 0", "it cannot be built: ZeroDivisionError: division by zero$"),
        (
            f"{BUILT}\n    def inputs(self, parameters, task): return {{}}",
            "family added cannot say what its inputs mean where nothing is named: TypeError: .*takes 3 .* 4 were",
        ),
        (
            f"{BUILT}\n    def appearances(self, module): return {{}}",
            "family added cannot say what its inputs mean where nothing is named: TypeError: too many positional",
        ),
        (
            f"{BUILT}\n    def inputs(self, parameters, task, names): return {{'1.weight': 64}}",
            "of its inputs family added says {'1.weight': 64}: expected an InputSpace by the path of a weight$",
        ),
    ],
)
def test_a_family_is_tried_before_anything_is_trained(add: Add, tmp_path: Path, built: str, said: str | None) -> None:
    add("families", ("nn.Linear(task.shape[0], task.outputs)", built))
    path = tmp_path / "job.toml"
    path.write_text(ADDED, encoding="utf-8")
    store = open_store(str(tmp_path / "store"))
    if said is None:
        assert [model.name for model in resolve(load_job(path), store).models] == ["added-0", "added-0-init"]
        return
    with pytest.raises(JobError, match=said) as refused:
        resolve(load_job(path), store)
    assert str(refused.value).startswith(f"{path}:5: [models[0]] ")


MEASURED = """
name = "measured"
[data.digits]
source = "digits"
[[models]]
family = "mlp"
data = "digits"
hyperparameters = { widths = [4] }
training = { steps = 2 }
[statistics.variation]
"""


def measured_job(folder: Path) -> Job:
    path = folder / "job.toml"
    path.write_text(MEASURED, encoding="utf-8")
    return load_job(path)


def test_primitives_that_cannot_be_are_told_before_anything_is_written(add: Add, tmp_path: Path) -> None:
    add("statistics", ('Moments("z", 2)', 'Moments("z", 3)'))
    store = open_store(str(tmp_path / "store"))
    line = next(number for number, text in enumerate(STATISTIC.splitlines(), 1) if 'Moments("z", 2)' in text)
    place = rf"^pipeline/statistics/variation\.py, line {line}: asked of site "
    with pytest.raises(ContractError, match=rf"{place}hidden0: ValueError: Moments\('z', 3\): expected order 2 or 4$"):
        run(measured_job(tmp_path), store, InlineExecutor())
    assert not (tmp_path / "store").exists()


def test_what_its_columns_raise_is_told_with_the_line(add: Add, tmp_path: Path) -> None:
    add("statistics", (VALUES, f"1 / 0 or {VALUES}"))
    line = next(number for number, text in enumerate(STATISTIC.splitlines(), 1) if VALUES in text)
    said = rf"^pipeline/statistics/variation\.py, line {line}: columns\(\) of site classifier: ZeroDivisionError"
    with pytest.raises(ContractError, match=said):
        run(measured_job(tmp_path), open_store(str(tmp_path / "store")), InlineExecutor())
    answer = CliRunner().invoke(
        cli, ["run", str(tmp_path / "job.toml"), "--ray", "none", "--store", str(tmp_path / "store")]
    )
    assert answer.exit_code == 2
    assert "Traceback" not in answer.output


FROZEN = "@dataclass(frozen=True)\nclass Variation"
OBSERVED = """
    def observe(self, presentations):
        return {"sum": 1 / 0}
    def merge(self, site, left, right):
        return left
"""


def test_what_it_raises_as_it_observes_is_told_too(add: Add) -> None:
    statistic = add("statistics", ("    def columns(", f"{OBSERVED}\n    def columns("))
    with pytest.raises(ContractError, match=r"variation\.py, line \d+: observe\(\) of site .*: ZeroDivisionError"):
        measure(torch.nn.Linear(3, 2), torch.randn(20, 3).split(8), statistics=[statistic])


@pytest.mark.parametrize(
    ("method", "raised", "said"),
    [
        ("empty(self, site)", "raise KeyError('oops')", r"(empty\(\)|asked) of site .*: KeyError: 'oops'"),
        ("observe(self, presentations)", "raise KeyError('oops')", r"observe\(\) of site .*: KeyError: 'oops'"),
        ("observe(self, presentations)", "raise SystemExit(3)", r"observe\(\) of site .*: SystemExit: 3"),
        ("merge(self, left, right)", "raise KeyError('oops')", r"merge\(\) of site .*: KeyError: 'oops'"),
    ],
)
def test_what_primitives_of_its_own_raise_is_told_too(
    add: Add, tmp_path: Path, method: str, raised: str, said: str
) -> None:
    own = f"@dataclass(frozen=True)\nclass Own(Moments):\n    def {method}:\n        {raised}\n\n\n{FROZEN}"
    statistic = add("statistics", (FROZEN, own), ('Moments("z", 2)', 'Own("z", 2)'))
    said = rf"pipeline/statistics/variation\.py, line \d+: {said}$"
    with pytest.raises(ContractError, match=f"^{said}"):
        measure(torch.nn.Linear(3, 2), torch.randn(20, 3).split(8), statistics=[statistic])
    measured_job(tmp_path)
    answer = CliRunner().invoke(
        cli, ["run", str(tmp_path / "job.toml"), "--ray", "none", "--store", str(tmp_path / "store")]
    )
    assert answer.exit_code == 2
    assert "Traceback" not in answer.output
    assert re.search(said, answer.output, re.M)
    assert not list(tmp_path.glob("store/runs/*/_manifest.json"))


MERGED = "merge(self, left, right):\n        return {name: left[name] for name in ('n', 'm2')}"
LONGER = "observe(self, shown):\n        return {name: value[None] for name, value in super().observe(shown).items()}"


@pytest.mark.parametrize(
    ("method", "wrong"), [(MERGED, "has z.m2, z.n where .* belong"), (LONGER, r"has z.absolute as .* \(1, 2\), not")]
)
def test_a_state_of_another_kind_is_told_before_it_is_stored(add: Add, method: str, wrong: str) -> None:
    own = f"@dataclass(frozen=True)\nclass Own(Moments):\n    def {method}\n\n\n{FROZEN}"
    statistic = add("statistics", (FROZEN, own), ('Moments("z", 2)', 'Own("z", 2)'))
    said = rf"^pipeline/statistics/variation\.py: its state of site .* {wrong}.*: expected of observe\(\) and "
    with pytest.raises(ContractError, match=said):
        measure(torch.nn.Linear(3, 2), torch.randn(20, 3).split(8), statistics=[statistic])


def test_what_is_raised_as_its_primitives_are_asked_for_is_told_too(add: Add) -> None:
    statistic = add("statistics", ('return {"z"', 'raise KeyError("oops")\n        return {"z"'))
    with pytest.raises(ContractError, match=r"variation\.py, line \d+: asked of site weight: KeyError: 'oops'$"):
        measure(torch.nn.Linear(3, 2), torch.randn(20, 3).split(8), statistics=[statistic])


def test_what_a_notebooks_own_raises_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(type(registry.statistics()["response"])):  # type: ignore[misc]
        def columns(self, *given: Any) -> Any:
            raise KeyError("gone")

    monkeypatch.setattr(Own, "__module__", "__main__")
    for module in ("__main__", "no.such.parent"):
        monkeypatch.setattr(Own, "__module__", module)
        with pytest.raises(ContractError, match=r"columns\(\) of site .*: KeyError: 'gone'"):
            measure(torch.nn.Linear(3, 2), torch.randn(20, 3).split(8), statistics=[Own()])


def test_an_edited_formula_is_another_run_of_the_same_states(add: Add, tmp_path: Path) -> None:
    store, found = open_store(str(tmp_path / "store")), []
    for factor in ("", "100 * "):
        add("statistics", (VALUES, factor + VALUES))
        outcome = run(measured_job(tmp_path), store, InlineExecutor())
        assert (outcome.new, outcome.reused_cells) == (True, 2 if factor else 0)
        neurons = pq.read_table(Path(store.url, "runs", outcome.run, "tables", "neurons"))
        found.append(neurons["variation"].to_numpy())
    assert not run(measured_job(tmp_path), store, InlineExecutor()).new, "nothing was edited since"
    edited = tmp_path / "variation.py"
    edited.write_text(edited.read_text() + "# what this process has not imported is not what it runs\n")
    assert not run(measured_job(tmp_path), store, InlineExecutor()).new
    np.testing.assert_allclose(found[1], 100 * found[0], rtol=1e-12)


@pytest.mark.parametrize("other", ['Moments("a", 2)', 'Moments("z", 4)'])
def test_states_of_other_primitives_are_refused_until_the_version_is_raised(
    add: Add, tmp_path: Path, other: str
) -> None:
    store = open_store(str(tmp_path / "store"))
    add("statistics")
    first = run(measured_job(tmp_path), store, InlineExecutor())
    add("statistics", ('Moments("z", 2)', other))
    with pytest.raises(StoreError, match=r"when variation needed other primitives: raise its version \(1\)"):
        run(measured_job(tmp_path), store, InlineExecutor())
    assert [key for key in store.keys("runs/") if key.endswith("/_manifest.json")] == [manifest_key(first.run)]
    add("statistics", ('Moments("z", 2)', other), ("version = 1", "version = 2"))
    assert run(measured_job(tmp_path), store, InlineExecutor()).reused_cells == 0


def test_a_worker_with_another_text_refuses(add: Add, tmp_path: Path) -> None:
    """As one does that was started after an edit, or on a machine with another checkout."""
    store = open_store(str(tmp_path / "store"))
    add("statistics")

    class Edited(InlineExecutor):
        def map(self, function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
            if any(hasattr(task, "texts") for task in tasks):
                add("statistics", (VALUES, "100 * " + VALUES))
            return super().map(function, tasks)

    with pytest.raises(ContractError, match=r"^pipeline/statistics/variation\.py has another text on .* than where"):
        run(measured_job(tmp_path), store, Edited())
    assert not list(store.keys("states/"))


def test_a_worker_that_has_not_yet_imported_a_family_finds_its_text(add: Add) -> None:
    add("families")
    texts = {"pipeline.models.added": text_of("pipeline.models.added")}
    assert texts["pipeline.models.added"]
    forget(texts)
    refuse_other_texts(texts)
    with pytest.raises(ContractError, match=r"^pipeline/models/added\.py has another text on "):
        refuse_other_texts(dict.fromkeys(texts, "of another checkout"))


OWN = """class Own(Moments):
    def observe(self, presentations):
        return super().observe(presentations)


"""


def test_an_edit_of_primitives_of_its_own_is_refused_until_the_version_is_raised(add: Add, tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    own = [("@dataclass(frozen=True)\n", f"{OWN}@dataclass(frozen=True)\n"), ('Moments("z", 2)', 'Own("z", 2)')]
    add("statistics", *own)
    run(measured_job(tmp_path), store, InlineExecutor())
    add("statistics", *own, ("super().observe(presentations)", "super().observe(presentations)  # edited"))
    with pytest.raises(StoreError, match=r"needed other primitives: raise its version \(1\)"):
        run(measured_job(tmp_path), store, InlineExecutor())


UNLIKE = [
    "class Own(Moments):\n    __eq__, __hash__ = object.__eq__, object.__hash__\n\n\n",
    *(
        f"{decorator}\nclass Own(Primitive):\n    of: str\n    order: int\n    empty = observe = merge = None\n\n\n"
        for decorator in ("@dataclass(frozen=True, eq=False)", "@dataclass")
    ),
]


@pytest.mark.parametrize("own", UNLIKE)
def test_primitives_that_are_no_values_are_refused(add: Add, tmp_path: Path, own: str) -> None:
    """No state of theirs would be found again, and the columns would be those of no data."""
    statistic = add("statistics", (FROZEN, own + FROZEN), ('Moments("z", 2)', 'Own("z", 2)'))
    said = r"^pipeline/statistics/variation\.py: asked of site {}: primitive z is another Own each time .* class Own, "
    with pytest.raises(ContractError, match=said.format("weight")):
        measure(torch.nn.Linear(3, 2), torch.randn(20, 3).split(8), statistics=[statistic])
    with pytest.raises(ContractError, match=said.format("hidden0")):
        run(measured_job(tmp_path), open_store(str(tmp_path / "store")), InlineExecutor())
    assert not (tmp_path / "store").exists()
    with pytest.raises((AssertionError, TypeError)):
        law_primitives(statistic, draw(NAMED["plain"]), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ("@dataclass(frozen=True)\nclass Own(Moments):\n    more: object = frozenset('ab')\n\n\n", "not JSON"),
        ("class Own:\n    def __init__(self, *given): pass\n\n\n", "dataclass"),
    ],
)
def test_primitives_that_cannot_be_named_are_refused(add: Add, tmp_path: Path, own: str, said: str) -> None:
    add(
        "statistics",
        ("@dataclass(frozen=True)\n", own + "@dataclass(frozen=True)\n"),
        ('Moments("z", 2)', 'Own("z", 2)'),
    )
    with pytest.raises(ContractError, match=rf"^pipeline/statistics/variation\.py.*: asked of site hidden0: .*{said}"):
        run(measured_job(tmp_path), open_store(str(tmp_path / "store")), InlineExecutor())
