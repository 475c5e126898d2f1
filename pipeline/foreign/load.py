"""From a model's files to a checkpoint of the store, and from there to a module with its weights.

Layer 2: takes bytes. A checkpoint holds weights by name, as the file has them; of a program, which is its own
architecture, the file. Nothing in the files is run or unpickled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from pipeline.errors import ModelError, is_machines_fault
from pipeline.foreign.architecture import Architecture, auto_class, optional
from pipeline.foreign.files import PROGRAMS
from pipeline.foreign.program import load_program
from pipeline.foreign.spec import LoadSpec
from pipeline.foreign.state import State, check_state, forms_of, in_words, read_state, superfluous
from pipeline.models.base import Checkpoint

# in front of a program's name: no weight is called so
_FILE = "file:"
# architectures whose weights' shapes a process keeps
_KEPT = 16


def checkpoint_of(
    architecture: Architecture, contents: Mapping[str, bytes], record: Mapping[str, Any], *, named: str
) -> Checkpoint:
    """The checkpoint of a model with these files, which fit the architecture; ModelError that says what does not.

    `named` is what the job calls the model's only file, for messages.
    """
    if architecture.config is not None:
        weights = _weights_of_directory(architecture.spec, contents)
    else:
        ((name, content),) = contents.items()
        if PurePosixPath(name).suffix in PROGRAMS:
            _program(named, content)
            weights = {f"{_FILE}{name}": torch.frombuffer(bytearray(content), dtype=torch.uint8)}
        else:
            expected = _forms(architecture)
            weights = read_state(named, content, key=architecture.spec.key, prefix=architecture.spec.prefix)
            check_state(expected, weights, named)
    # a weight that is tied to another would be refused
    return Checkpoint({name: value.detach().clone() for name, value in weights.items()}, dict(record))


def restored(architecture: Architecture, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The module of a checkpoint, in eval mode. ModelError where it is not one of this architecture."""
    files = [name for name in checkpoint.weights if name.startswith(_FILE)]
    if files:
        (name,) = files
        return _program(name.removeprefix(_FILE), checkpoint.weights[name].numpy().tobytes()).to(dtype)
    with torch.random.fork_rng(devices=[]):
        module = architecture.build().to(dtype)
    try:
        module.load_state_dict(checkpoint.weights)
    except RuntimeError as error:
        if is_machines_fault(error):
            raise
        raise ModelError(f"its checkpoint does not fit: {error}") from error
    return module.eval()


@lru_cache(maxsize=_KEPT)
def _forms(architecture: Architecture) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        return forms_of(architecture.build())


def _program(name: str, content: bytes) -> nn.Module:
    if name.endswith(".pt2"):
        return load_program(name, content)
    return _from_onnx(name, content).eval()


def _from_onnx(name: str, content: bytes) -> nn.Module:
    onnx, converter = optional("onnx", extra="onnx"), optional("onnx2pytorch", extra="onnx")
    try:
        program = onnx.load_model_from_string(content)
        # the converter would read whatever file of this machine they name
        if _is_elsewhere(program):
            raise ModelError(f"{name} has weights in other files: save it as one, with save_as_external_data=False")
        return converter.ConvertModel(program)  # type: ignore[no-any-return]
    except Exception as error:  # protobuf's and the converter's errors
        if isinstance(error, ModelError) or is_machines_fault(error):
            raise
        raise ModelError(f"{name} cannot be converted: {type(error).__name__}: {error}") from error


def _is_elsewhere(message: Any) -> bool:
    """Whether a tensor of an ONNX message lies in another file."""
    for field, value in message.ListFields():
        if field.name == "data_location" and value != 0:
            return True
        if field.type == field.TYPE_MESSAGE and any(map(_is_elsewhere, value if field.is_repeated else [value])):
            return True
    return False


@contextmanager
def _silent() -> Iterator[None]:
    """Transformers reports on paper what is an error here, or no harm."""
    logging = optional("transformers.utils.logging", extra="transformers")
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()


def _weights_of_directory(spec: LoadSpec, contents: Mapping[str, bytes]) -> State:
    maker = auto_class(spec)
    if not any(name.endswith(".safetensors") for name in contents):
        raise ModelError("a transformers directory without *.safetensors: convert its pickled weights first")
    with TemporaryDirectory() as directory:
        for name, content in contents.items():
            Path(directory, name).write_bytes(content)
        try:
            with _silent():
                module, found = maker.from_pretrained(
                    directory,
                    local_files_only=True,
                    trust_remote_code=False,
                    use_safetensors=True,
                    output_loading_info=True,
                    **spec.arguments,
                )
        except Exception as error:  # transformers raises many kinds
            if is_machines_fault(error):
                raise
            raise ModelError(f"transformers cannot load the directory: {type(error).__name__}: {error}") from error
    problems = {
        "missing": sorted(found["missing_keys"]),
        # the head of a task besides the model asked for is no harm, a model of which only a part would be built is
        "unexpected": superfluous(module, sorted(found["unexpected_keys"]), base=module.base_model_prefix),
        "of another shape": sorted(map(str, found["mismatched_keys"])),
    }
    if any(problems.values()):
        raise ModelError(f"the directory's weights do not fit {spec.auto}: {in_words(problems)}")
    return module.state_dict()  # type: ignore[no-any-return]
