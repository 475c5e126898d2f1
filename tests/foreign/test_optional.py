"""What needs a package that is not always installed."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from torch.nn import functional

from pipeline.errors import JobError, ModelError
from pipeline.foreign.files import digests_of, find_models, read_model
from pipeline.foreign.spec import LoadSpec
from pipeline.job import load_job
from pipeline.models.base import Task
from tests.census import run_inline
from tests.foreign.modules import load_module
from tests.models.build import build

TASK = Task((6,), 3)


@pytest.mark.parametrize(
    ("name", "content", "spec", "said"),
    [
        ("m.onnx", b"", {}, r"onnx cannot be imported: .*pip install 'neuron-census\[onnx\]'"),
        ("m.pt", b"", {"timm": "resnet18"}, r"timm cannot be imported: .*neuron-census\[timm\]"),
        ("config.json", b"{}", {}, r"transformers cannot be imported: .*neuron-census\[transformers\]"),
    ],
)
def test_a_package_that_is_missing_is_named(
    name: str, content: bytes, spec: Mapping[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("onnx", "onnx2pytorch", "timm", "transformers"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(JobError, match=said):
        load_module(LoadSpec(url="x", **spec), {name: content}, TASK)


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 30,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_a_transformers_directory(bert: Path) -> None:
    transformers = pytest.importorskip("transformers")
    spec = LoadSpec(url="x")
    (bert / "pytorch_model.bin").write_bytes(b"a pickle that is never read")
    (found,) = find_models(str(bert))
    assert found.config is not None
    module = load_module(spec, read_model(found, digests_of(found)), TASK)
    token = torch.randint(30, (2, 5))
    expected = transformers.BertModel.from_pretrained(bert).eval()
    assert torch.equal(module(token).last_hidden_state, expected(token).last_hidden_state)


def test_weights_that_a_transformers_class_misses_are_an_error(bert: Path) -> None:
    spec = LoadSpec(url="x", auto="AutoModelForSequenceClassification")
    with pytest.raises(ModelError, match=r"do not fit AutoModelForSequenceClassification: .*classifier"):
        load_module(spec, read_all(bert), TASK)
    state = safetensors.torch.load((bert / "model.safetensors").read_bytes())
    state.pop("encoder.layer.0.output.dense.weight")
    write(bert, state)
    with pytest.raises(ModelError, match=r"do not fit AutoModel: .*encoder.layer.0.output.dense.weight"):
        load_module(LoadSpec(url="x"), read_all(bert), TASK)


def test_weights_of_more_layers_than_the_configuration_has_are_an_error(bert: Path) -> None:
    state = safetensors.torch.load((bert / "model.safetensors").read_bytes())
    more = {name.replace("layer.0.", "layer.1."): value.clone() for name, value in state.items() if "layer.0." in name}
    write(bert, state | more)
    with pytest.raises(ModelError, match=r"do not fit AutoModel: 16 unexpected: encoder\.layer\.1\..* and 8 more"):
        load_module(LoadSpec(url="x"), read_all(bert), TASK)
    # the head of another task is no part of this one
    write(bert, {f"bert.{name}": value for name, value in state.items()} | {"cls.predictions.bias": torch.zeros(30)})
    load_module(LoadSpec(url="x"), read_all(bert), TASK)


def test_a_directory_of_pickles_alone_is_refused(bert: Path) -> None:
    (bert / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"without \*.safetensors"):
        load_module(LoadSpec(url="x"), read_all(bert), TASK)


def write(directory: Path, state: dict[str, torch.Tensor]) -> None:
    (directory / "model.safetensors").write_bytes(safetensors.torch.save(state, metadata={"format": "pt"}))


def read_all(directory: Path) -> dict[str, bytes]:
    (found,) = find_models(str(directory))
    return dict(read_model(found, digests_of(found)))


def test_a_timm_model() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    expected = timm.create_model("resnet10t", pretrained=False, num_classes=3).eval()
    content = safetensors.torch.save(dict(expected.state_dict()))
    spec = LoadSpec(url="x", timm="resnet10t", arguments={"num_classes": 3})
    module = load_module(spec, {"m.safetensors": content}, TASK)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(module(x), expected(x))
    with pytest.raises(ModelError, match="did you mean 'resnet10t'"):
        load_module(LoadSpec(url="x", timm="resnet10x"), {"m.safetensors": content}, TASK)


def test_an_onnx_program() -> None:
    pytest.importorskip("onnx2pytorch")
    onnx = pytest.importorskip("onnx")
    model = build("mlp", TASK, widths=(8,))
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    helper = onnx.helper
    nodes, last = [], "x"
    for number, (layer, gate) in enumerate((("hidden0", True), ("classifier", False))):
        nodes.append(helper.make_node("Gemm", [last, f"{layer}.weight", f"{layer}.bias"], [f"z{number}"], transB=1))
        last = f"z{number}"
        if gate:
            nodes.append(helper.make_node("Relu", [last], [f"a{number}"]))
            last = f"a{number}"
    values = [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()]
    ends = [
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["rows", width])]
        for name, width in (("x", 6), (last, 3))
    ]
    program = helper.make_model(
        helper.make_graph(nodes, "mlp", *ends, values), opset_imports=[helper.make_opsetid("", 17)]
    )
    buffer = io.BytesIO(program.SerializeToString())
    module = load_module(LoadSpec(url="x"), {"m.onnx": buffer.getvalue()}, TASK)
    x = torch.randn(4, 6)
    torch.testing.assert_close(module(x), model(x))
    with pytest.raises(ModelError, match=r"m.onnx cannot be converted"):
        load_module(LoadSpec(url="x"), {"m.onnx": buffer.getvalue()[:100]}, TASK)
    tensor = program.graph.initializer[0]
    onnx.external_data_helper.set_external_data(tensor, location="/etc/hostname")
    tensor.ClearField("raw_data")
    with pytest.raises(ModelError, match=r"m.onnx has weights in other files"):
        load_module(LoadSpec(url="x"), {"m.onnx": program.SerializeToString()}, TASK)


JOB = """
name = "texts"
[data.texts]
source = "tokens"
url = "texts.parquet"
classes = 3
columns = { features = "tokens", label = "label", shape = [7] }
options = { tokenizer = "ids", vocabulary = 30 }
[[models]]
data = "texts"
load = { url = "bert", auto = "AutoModelForSequenceClassification" }
[statistics.response]
[statistics.importance]
"""


def test_a_classifier_of_texts_from_job_to_tables(bert: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig.from_pretrained(bert, num_labels=3)
    torch.manual_seed(1)
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(bert)
    lengths = [1, 7, 3, 5]
    tokens = [torch.randint(1, 30, (length,)).tolist() for length in lengths]
    label_N = torch.tensor([0, 1, 2, 0])
    pq.write_table(pa.table({"tokens": tokens, "label": label_N.numpy()}), tmp_path / "texts.parquet")
    (tmp_path / "job.toml").write_text(JOB)
    outcome, store = run_inline(load_job(tmp_path / "job.toml"), str(tmp_path / "store"))
    assert (outcome.loaded, outcome.failed) == (2, {})
    rows = {
        name: pq.read_table(io.BytesIO(store.get(f"runs/{outcome.run}/tables/{name}/part-00000.parquet")))
        for name in ("models", "neurons", "scores")
    }
    models = rows["models"].to_pandas().set_index("name")
    assert models.loc["bert", "control"] == models.loc["bert-init", "model"]
    neurons = rows["neurons"].to_pandas().query("model == @models.model['bert']")
    within = neurons[neurons["site"].str.contains("intermediate")]
    # padding is no presentation
    assert set(within["n"]) == {sum(lengths)}
    assert within["importance_mean_ablation"].notna().all()
    logits_NC = torch.cat([model(torch.tensor([one])).logits for one in tokens])
    scores = rows["scores"].to_pandas().query("model == @models.model['bert']").set_index("metric")["value"]
    assert scores["log_loss"] == pytest.approx(float(functional.cross_entropy(logits_NC, label_N)), rel=1e-5)
