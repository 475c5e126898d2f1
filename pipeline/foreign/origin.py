"""Where the models of a job come from that it does not train: files, and untrained twins of what those are of.

Layer 2. An origin names its model before anything of it is read but its digest, and makes its checkpoint once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from pipeline.batch import Batch
from pipeline.errors import ModelError
from pipeline.foreign.architecture import Architecture
from pipeline.foreign.files import ModelFiles, read_model, sha256_of
from pipeline.foreign.load import checkpoint_of, restored
from pipeline.foreign.untrained import untrained
from pipeline.hashing import digest
from pipeline.job_sections import Numerics
from pipeline.models.base import Checkpoint
from pipeline.sources.base import Chunk

# raised whenever the same architecture and seed would give another untrained twin
UNTRAINED_VERSION = 3


@dataclass(frozen=True)
class Loaded:
    """A model that was found as files.

    digests  SHA-256 of each of its files, by name
    named    the files as the job names them, those of the same content too
    """

    architecture: Architecture
    files: ModelFiles
    digests: Mapping[str, str]
    named: tuple[str, ...]
    dtype: str

    @cached_property
    def id(self) -> str:
        """Its name, from its bytes and from how it is built."""
        architecture = self.architecture
        return architecture.spec.model_id(sha256_of(self.digests), family_version=architecture.family_version)

    def module(self) -> nn.Module:
        """A module of its shape: of a program itself, of all others with any weights. ModelError or DataError."""
        if not self.files.is_program:
            return self.architecture.build()
        return restored(self.architecture, self.checkpoint())

    def checkpoint(self) -> Checkpoint:
        """Read its files and check that they fit. DataError if they changed since; ModelError if they do not fit."""
        contents = read_model(self.files, self.digests)
        record = {"sha256": sha256_of(self.digests)}
        return checkpoint_of(self.architecture, contents, record, named=self.named[0])


@dataclass(frozen=True)
class Untrained:
    """The control of loaded models: what they are built as, its weights drawn anew.

    data      name of the data set that it is measured on
    chunks    of whose rows its BatchNorm statistics are taken; none where it has no BatchNorm
    numerics  with which it sees those rows
    """

    architecture: Architecture
    seed: int
    data: str
    chunks: tuple[Chunk, ...]
    numerics: Numerics

    @property
    def dtype(self) -> str:
        """Of its forward when it is measured."""
        return self.numerics.dtype

    @cached_property
    def id(self) -> str:
        """Its name, from how it is built, the seed, and what it has seen, how, and is to see."""
        # it is built and sees them in the type of its constructor
        how = self.numerics.model_dump(mode="json", exclude={"dtype"})
        rows = [[chunk.id for chunk in self.chunks], how] if self.chunks else None
        return digest(["untrained", UNTRAINED_VERSION, self.architecture.id, self.seed, self.data, rows])

    def checkpoint(self, rows: Iterable[Batch]) -> Checkpoint:
        """Draw its weights; `rows` are some of its chunks'. ModelError if some are not drawn by its constructor."""
        module = untrained(self.architecture.build, self.seed, (self.architecture.call.shown(one) for one in rows))
        if module is None:
            raise ModelError("its constructor leaves weights as the memory has them: it has no untrained twin")
        weights = {name: value.detach().clone() for name, value in module.state_dict().items()}
        return Checkpoint(weights, {"seed": self.seed})
