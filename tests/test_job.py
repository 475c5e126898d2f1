"""Job files: read strictly, refused with the place, the value and what was expected."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline.errors import JobError
from pipeline.hashing import digest
from pipeline.job import Job, job_identity, load_job, misfit, unknown
from pipeline.places import find_places

GOOD = """\
name = "small"  # for people

[numerics]
batch_rows = 64

[data.mnist]
url = "rows/*.parquet"
classes = 10
columns = { features = "image", label = "label", split = "split", shape = [1, 28, 28] }

[[models]]
family = "mlp"
data = "mnist"
seeds = [0, 1]
hyperparameters = { widths = [8] }

[[models]]
family = "cnn"
data = "mnist"
[models.training]
learning_rate = 1

[statistics.template]
sample_rows = 100

[resources]
workers = 2
"""


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write the good job with some of its text replaced, and return its path relative to where it is."""
    monkeypatch.chdir(tmp_path)

    def write(old: str = "", new: str = "") -> Path:
        assert old in GOOD
        Path("job.toml").write_text(GOOD.replace(old, new, 1))
        return Path("job.toml")

    return write


def test_a_good_job_is_read(written):
    job = load_job(written())
    assert job.numerics.batch_rows == 64
    assert job.numerics.threads == 1
    assert job.data["mnist"].columns.shape == (1, 28, 28)
    assert job.models[0].hyperparameters == {"widths": (8,)}
    assert job.models[1].training == {"learning_rate": 1}
    assert job.statistics == {"template": {"sample_rows": 100}}
    assert job.place == "job.toml"


@pytest.mark.parametrize(
    "given", ['url = "abfss://box@account/x"', 'options = { pattern = "//[a-z]+" }', 'options = { at = "a@b" }']
)
def test_what_only_looks_like_credentials_is_taken(tmp_path: Path, given: str):
    key = given.split(" = ")[0]
    text = GOOD.replace('url = "rows/*.parquet"', given if key == "url" else f'url = "rows"\n{given}')
    assert load_job_text(tmp_path, text).data["mnist"]


def test_it_cannot_be_changed(written):
    job = load_job(written())
    with pytest.raises(ValidationError):
        job.name = "other"


def test_paths_are_relative_to_the_job(written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    job = load_job(written())
    monkeypatch.chdir("/")
    travelled = pickle.loads(pickle.dumps(job))
    assert travelled.data["mnist"].location == str(tmp_path / "rows/*.parquet")
    assert travelled.place == "job.toml"
    remote = load_job_text(tmp_path, GOOD.replace("rows/*.parquet", "s3://bucket/rows"))
    assert remote.data["mnist"].location == "s3://bucket/rows"


def load_job_text(folder: Path, text: str) -> Job:
    (folder / "other.toml").write_text(text)
    return load_job(folder / "other.toml")


WRONG = [
    ("batch_rows = 64", "batchrows = 64", "4: [numerics] batchrows = 64: unknown key; did you mean 'batch_rows'?"),
    ("batch_rows = 64", 'batch_rows = "64"', '4: [numerics] batch_rows = "64": expected an integer'),
    ("batch_rows = 64", "batch_rows = 0", "4: [numerics] batch_rows = 0: expected greater than or equal to 1"),
    ("batch_rows = 64", "batch_rows = true", "4: [numerics] batch_rows = true: expected an integer"),
    ("batch_rows = 64", 'dtype = "float8"', "4: [numerics] dtype = \"float8\": expected 'float32', 'float64'"),
    ("[numerics]", "[numerisc]", "3: numerisc = {\"batch_rows\": 64}: unknown key; did you mean 'numerics'?"),
    ('name = "small"', 'name = ""', '1: name = "": expected '),
    ('name = "small"', "", " name is missing: expected name = … (for people; in the manifest)"),
    ('family = "mlp"', "", "11: [models[0]] family is missing: expected family = … (how the models are built)"),
    ("seeds = [0, 1]", "seeds = [0, 0]", "11: [models[0]] seeds must be different"),
    ("seeds = [0, 1]", "seeds = [0, 0.5]", "14: [models[0]] seeds[1] = 0.5: expected an integer"),
    ("seeds = [0, 1]", "seed = [0, 1]", "14: [models[0]] seed = [0, 1]: unknown key; did you mean 'seeds'?"),
    ("shape = [1, 28, 28]", "shape = [1, -28, 28]", "9: [data.mnist.columns] shape[1] = -28: expected greater than 0"),
    ("classes = 10", 'labels = ["a", "b", "a"]', "6: [data.mnist] labels names 'a' twice; expected each class once"),
    (
        "classes = 10",
        'labels = ["a", "b"]\nclasses = 3',
        "6: [data.mnist] classes = 3, but labels names 2",
    ),
    ('url = "rows/*.parquet"', 'url = "rows/\\u0000"', "6: [data.mnist] url holds the character 0, which no name has"),
    ('label = "label"', "label = 3", "9: [data.mnist.columns] label = 3: expected a string"),
    ('features = "image"', "features = 3", "9: [data.mnist.columns] features = 3: expected a string or an array"),
    ("split = ", "splits = ", "[data.mnist.columns] splits = \"split\": unknown key; did you mean 'split'?"),
    (
        'features = "image"',
        'features = ["a", "b", "a"]',
        '9: [data.mnist.columns] features = ["a", "b", "a"]: expected every column once, and \'a\' is there twice',
    ),
    (
        'features = "image"',
        'features = ["a", "label"]',
        "9: [data.mnist.columns] column 'label' is the label and one of",
    ),
    (
        'features = "image"',
        'features = "label"',
        "9: [data.mnist.columns] column 'label' is the label and one of the f",
    ),
    ("rate = 1", "rate = inf", "21: [models[1].training] learning_rate = Infinity: expected a finite number"),
    ("learning_rate = 1", "when = 2020-01-01", "21: [models[1].training] when = 2020-01-01: expected a number, a str"),
    (
        "workers = 2",
        "gpus_per_worker = 1.5",
        "27: [resources] gpus_per_worker = 1.5: expected a share of a GPU in steps",
    ),
    ("workers = 2", "gpus_per_worker = 1e-5", "27: [resources] gpus_per_worker = 1e-05: expected a share of a GPU"),
    ("workers = 2", "gpus_per_worker = inf", "27: [resources] gpus_per_worker = Infinity: expected a share of a GPU"),
    ("workers = 2", "workers = -1", "27: [resources] workers = -1: expected greater than or equal to 0"),
    ("[resources]", "[sites]\nrows = { conv = 0.0 }\n[resources]", "26: [sites] rows of 'conv' = 0.0: expected a fr"),
    (
        "[resources]",
        '[sites]\nexclude = ["gates:relu"]\n[resources]',
        "26: [sites] 'gates:relu': gates: is no label of a",
    ),
    (
        "classes = 10",
        'measure = ["test", "te/st"]',
        '8: [data.mnist] measure[1] = "te/st": expected a split without "/": rename it in the data as well, "te-st"',
    ),
    ("rows/*.parquet", "https://me:hunter2@host/x", "6: [data.mnist] url must not hold credentials"),
    *(
        ("rows/*.parquet", f"https://host/x?a=1&{sign}=hunter2", "6: [data.mnist] url must not hold credentials")
        for sign in (
            *("X-Amz-Signature", "X-Amz-Credential", "X-Amz-Security-Token", "AWSAccessKeyId", "Signature", "sig"),
            *("X-Goog-Credential", "GoogleAccessId", "sas", "token", "access_token", "private_token", "job-token"),
            *("id_token", "jwt", "key", "apikey", "api_key", "api-key", "access_key", "secret_key", "client_secret"),
            *("secret", "password", "passwd", "pwd", "user_password", "auth", "authorization", "credential"),
        )
    ),
    ("rows/*.parquet", "abfss://box@account/x?sig=a", "6: [data.mnist] url must not hold credentials"),
    (
        "classes = 10",
        'options = { files = ["https://h/?sig=AAA"] }',
        "6: [data.mnist] options.files[0] must not hold credentials",
    ),
    (
        "classes = 10",
        'options = { edges = "s3://key:hunter2@x/y" }',
        "6: [data.mnist] options.edges must not hold credentials",
    ),
    ("seeds = [0, 1]", "seeds = [0, 1", " not valid TOML: "),
    (
        "[numerics]",
        "seed = 20260101000000\n[numerics]",
        "3: seed = 20260101000000: expected less than or equal to 9223344",
    ),
]


@pytest.mark.parametrize(("old", "new", "message"), WRONG)
def test_what_is_wrong_is_said_where_it_is(written, old: str, new: str, message: str):
    with pytest.raises(JobError) as caught:
        load_job(written(old, new))
    assert f"job.toml:{message}" in str(caught.value) or (message[0] == "[" and message in str(caught.value))
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_that_is_wrong_is_said_at_once(written):
    path = written("batch_rows = 64", 'batchrows = 64\nthreads = "2"')
    with pytest.raises(JobError) as caught:
        load_job(path)
    assert [line.split(":")[1] for line in sorted(str(caught.value).splitlines())] == ["4", "5"]


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path):
    with pytest.raises(JobError, match=r"nowhere\.toml: there is no such job file"):
        load_job(tmp_path / "nowhere.toml")
    with pytest.raises(JobError, match="cannot be read"):
        load_job(tmp_path)
    (tmp_path / "deep.toml").write_text("x = " + "[" * 5000)
    with pytest.raises(JobError, match=r"deep\.toml: cannot be read: its values are nested too deeply"):
        load_job(tmp_path / "deep.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(JobError, match="cannot be read"):
        load_job(tmp_path / "binary.toml")


def test_without_a_split_column_all_rows_are_one_split(written):
    job = load_job(written(', split = "split"', ""))
    assert job.data["mnist"].train == "all"
    assert job.data["mnist"].measure == ("all",)
    text = GOOD.replace(', split = "split"', "").replace("classes = 10", 'measure = ["test"]')
    with pytest.raises(JobError, match=r"\[data\.mnist\] splits \['all', 'test'\] need columns\.split"):
        load_job_text(Path(), text)


def test_names_that_nothing_splits_may_hold_a_slash(written):
    text = GOOD.replace("data.mnist", 'data."digits/mnist"').replace('"mnist"', '"digits/mnist"')
    job = load_job_text(written().parent, text.replace("classes = 10", 'train = "tr/ain"'))
    assert [spec.train for spec in job.data.values()] == ["tr/ain"]


def test_unknown_names_are_refused_in_the_same_words(written):
    job = load_job(written())
    assert str(unknown(job, "models[1].family", "cn", ["cnn", "mlp"])) == (
        "job.toml:18: [models[1]] family = \"cn\": unknown; did you mean 'cnn'? known: cnn, mlp"
    )
    assert str(unknown(job, "models[0].hyperparameters.width", "width", ["widths"])) == (
        "job.toml:15: [models[0].hyperparameters] width: unknown key; did you mean 'widths'? known: widths"
    )
    assert str(unknown(job, "statistics", "template", ["match"])).startswith(
        "job.toml:23: [statistics] template: unknown key; known: match"
    )
    assert str(misfit(job, "statistics.template.sample_rows", "x", "a value like 20000")) == (
        'job.toml:24: [statistics.template] sample_rows = "x": expected a value like 20000'
    )


def test_a_job_made_in_code_has_no_place():
    job = Job.model_validate({"name": "x", "data": {"d": {}}, "models": ({"family": "f", "data": "d"},)})
    assert str(unknown(job, "models[0].family", "f", ["g"])).startswith('job: [models[0]] family = "f": unknown')


def test_resources_and_layout_are_in_no_digest(written):
    identity = digest(job_identity(load_job(written())))
    assert identity == digest(job_identity(load_job(written("workers = 2", "workers = 7\nretries = 1"))))
    assert identity == digest(job_identity(load_job(written("[numerics]", "# a comment\n[numerics]\nthreads = 1"))))
    assert identity != digest(job_identity(load_job(written("batch_rows = 64", "batch_rows = 65"))))
    assert identity != digest(job_identity(load_job(written("learning_rate = 1", "learning_rate = 2"))))


def test_places_of_headers_keys_quotes_and_nested_arrays():
    text = '[a."b"]\nx = 1\n[[m]]\n[[m.n]]\n[[m.n]]\n"k" = [\n 1,\n]\n[[m]]\n[m.t]\nz.y = 2  # = 3\n'
    places = find_places("f.toml", text)
    assert places.at("a.b.x") == "f.toml:2"
    assert places.at("m[0].n[1].k[0]") == "f.toml:6"
    assert places.at("m[1].t.z.y") == "f.toml:11"
    assert places.at("m[1].unheard") == "f.toml:9"
    assert places.at("nothing") == "f.toml"
    # names that no path of a key can tell from its punctuation
    assert [places.at(key) for key in ("a.b.x.", "m[0].a]", "m[1].t.[", "]", ".", "a..")] == [
        "f.toml:2", "f.toml:3", "f.toml:10", "f.toml", "f.toml", "f.toml"
    ]  # fmt: skip
