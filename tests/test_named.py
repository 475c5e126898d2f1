"""A job file is refused once, with every mistake that shows without a look at data: shapes and names alike."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline.cli import cli
from pipeline.errors import JobError
from pipeline.job import read_job
from pipeline.named import checked_job
from pipeline.store import open_store

GOOD = """\
name = "small"
[numerics]
batch_rows = 64
[data.rows]
url = "rows.parquet"
classes = 3
columns = { features = "x", label = "y", split = "split", shape = [4] }
[[models]]
family = "mlp"
data = "rows"
seeds = 2
hyperparameters = { widths = [8] }
training = { steps = 5, learning_rate = 0.1 }
[[models]]
family = "cnn"
data = "rows"
grid = { learning_rate = [0.1, 0.2] }
[statistics.template]
sample_rows = 100
"""
SHAPE = ("batch_rows = 64", 'batch_rows = "64"', '3: [numerics] batch_rows = "64": expected an integer')
# old, new, and all that is said of it
NAMES = [
    ('family = "mlp"', 'family = "mpl"', ['9: [models[0]] family = "mpl": unknown; ']),
    ('data = "rows"\nseeds', 'data = "row"\nseeds', ["10: [models[0]] data = \"row\": unknown; did you mean 'rows'?"]),
    ("[statistics.template]", "[statistics.templat]", ["18: [statistics] templat: unknown key; did you mean 'templ"]),
    ("sample_rows", "sample", ["19: [statistics.template] sample: unknown key; did you mean 'sample_rows'?"]),
    ("url", 'source = "parket"\nurl', ["5: [data.rows] source = \"parket\": unknown; did you mean 'parquet'?"]),
    (
        "url",
        "options = { resize = 1, size = 2 }\nurl",
        ["] options.resize = 1: unknown key", "] options.size = 2: unk"],
    ),
    ("widths = [8]", "width = [8]", ["12: [models[0].hyperparameters] width: unknown key; did you mean 'widths'?"]),
    (
        "steps = 5, learning_rate = 0.1",
        "step = 5, learning_rate = -1",
        ["13: [models[0].training] learning_rate = -1: expected greater", "13: [models[0].training] step: unknown key"],
    ),
    (
        "widths = [8] }\ntraining = { steps",
        "width = [8] }\ntraining = { step",
        ["12: [models[0].hyp", "13: [models[0].t"],
    ),
    ("learning_rate = [0.1, 0.2]", "lerning_rate = [0.1]", ["17: [models[1].grid] lerning_rate: unknown key"]),
    ("[0.1, 0.2]", "[-0.1, -0.2]", ["17: [models[1].grid] learning_rate = -0.1: e", "ning_rate = -0.2: e"]),
]
# of what is wrong nothing more is said, and what goes without it is no mistake
SHAPES = [
    ('family = "mlp"', "family = 3", "9: [models[0]] family = 3: expected a string"),
    ('family = "mlp"', "", "8: [models[0]] family is missing"),
    ('data = "rows"\nseeds', "seeds", "8: [models[0]] data is missing"),
    ("seeds = 2", "seeds = [0, 0.5]", "11: [models[0]] seeds[1] = 0.5: expected an integer"),
    ("[data.rows]", "[data.rows]\ntrain = 3", "5: [data.rows] train = 3: expected a string"),
    ('url = "rows.parquet"', 'url = "https://me:hunter2@host"', "4: [data.rows] url must not hold credentials"),
    ("hyperparameters = {", "hyperparameters = { x = nan,", "12: [models[0].hyperparameters] x = NaN: expected a fini"),
    ("classes = 3", 'measure = ["a/b"]', '6: [data.rows] measure[0] = "a/b": expected a split without'),
    ('name = "small"\n', "", "job.toml: name is missing"),
    ('[[models]]\nfamily = "cnn"', '[[model]]\nfamily = "cnn"', "model = "),
    ("seeds = 2", "load = { url = 's3://key:secret@x/y' }", "8: [models[0]] family says how to train"),
    (
        "steps = 5,",
        "steps = -5, checkpoints = [2], schedule = 'step', decay_steps = [3],",
        "[models[0].training] steps = -5: expected gr",
    ),
    ("classes = 3", "measure = []", "6: [data.rows] measure = []: expected at least 1"),
    ("seeds = 2", "seeds = 100000000000", "11: [models[0]] seeds = 100000000000: expected at most 1000000"),
    ("batch_rows", "threads = 100000000000\nbatch_rows", "3: [numerics] threads = 100000000000: expected less than"),
    ('url = "rows.parquet"', 'url = ""', '5: [data.rows] url = "": expected at least 1 character'),
    ("split = ", "splits = ", "splits = \"split\": unknown key; did you mean 'split'?"),
]


def mistakes(folder: Path, *changed: tuple[str, str]) -> list[str]:
    text = GOOD
    for old, new in changed:
        assert old in text
        text = text.replace(old, new, 1)
    (folder / "job.toml").write_text(text)
    with pytest.raises(JobError) as caught:
        checked_job(folder / "job.toml", open_store("memory://unused"))
    return str(caught.value).splitlines()


@pytest.mark.parametrize(("old", "new", "said"), NAMES)
def test_names_are_said_beside_shapes(old: str, new: str, said: list[str], tmp_path: Path) -> None:
    alone, both = mistakes(tmp_path, (old, new)), mistakes(tmp_path, SHAPE[:2], (old, new))
    assert len(alone) == len(said)
    assert all(wanted in line for wanted, line in zip(said, alone, strict=True)), alone
    assert SHAPE[2] in both[0]
    assert both[1:] == alone


@pytest.mark.parametrize(("old", "new", "said"), SHAPES)
def test_what_goes_without_a_wrong_shape_is_no_mistake(old: str, new: str, said: str, tmp_path: Path) -> None:
    (only,) = mistakes(tmp_path, (old, new))
    assert said in only
    first, second = mistakes(tmp_path, (old, new), ("[statistics.template]", "[statistics.templat]"))
    assert first == only
    assert "[statistics] templat: unknown key" in second


def test_a_file_of_which_nothing_can_be_read_says_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text('nam = "x"\n[dta.rows]\n[[models]]\nfamily = "mpl"\ndata = "rows"')
    asked = read_job(tmp_path / "job.toml")
    assert asked.job is None
    assert len(asked.mistakes) == 4
    with pytest.raises(JobError, match="data is missing"):
        checked_job(tmp_path / "job.toml", open_store("memory://unused"))


@pytest.mark.parametrize("command", [["plan"], ["run", "--ray", "none"], ["submit", "--ray", "http://127.0.0.1:1"]])
def test_commands_say_all_of_it_and_write_nothing(command: list[str], tmp_path: Path) -> None:
    mistakes(tmp_path, SHAPE[:2], ('family = "mlp"', 'family = "mpl"'))
    store = tmp_path / "store"
    done = CliRunner().invoke(cli, [*command, str(tmp_path / "job.toml"), "--store", str(store)])
    assert done.exit_code == 2
    assert [line for line in done.output.splitlines() if "job.toml:" in line] == done.output.splitlines()
    assert len(done.output.splitlines()) == 2
    assert not store.exists()
