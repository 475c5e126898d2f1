"""Loaded models as modules, from files in memory."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from pipeline.foreign.architecture import Architecture
from pipeline.foreign.files import CONFIG
from pipeline.foreign.load import checkpoint_of, restored
from pipeline.foreign.spec import LoadSpec
from pipeline.models.base import Task


def load_module(spec: LoadSpec, contents: Mapping[str, bytes], task: Task) -> nn.Module:
    """The module in eval mode with its weights, from its files by name, as a run makes it."""
    architecture = Architecture(spec, task, contents.get(CONFIG))
    return restored(architecture, checkpoint_of(architecture, contents, {}, named=next(iter(contents))))
