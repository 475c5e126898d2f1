"""The job's `load` table: which files are models, and what their weights belong to.

Layer 2: imports nothing of the pipeline but the digest.
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from pipeline.hashing import digest

# raised whenever the same file would be built into another model
LOAD_VERSION = 1


class LoadSpec(BaseModel):
    """Models from files. At most one of `family`, `builder` and `timm` says what a state_dict belongs to.

    Programs (.pt2, .onnx) and transformers directories say it themselves.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    url: str = Field(description="file, directory or glob on any fsspec URL; every match is a model")
    sha256: str | None = Field(
        default=None,
        description="of the only file, or of sha256sum's lines of all that match, by name",
    )
    family: str | None = Field(default=None, description="family of the weights")
    builder: str | None = Field(default=None, description="'package.module:name' of a class or function that builds it")
    timm: str | None = Field(default=None, description="name of a timm model")
    auto: str = Field(default="AutoModel", description="transformers class for a directory")
    arguments: dict[str, Any] = Field(default={}, description="of the builder, or the family's hyperparameters")
    key: str | None = Field(default=None, description="entry of a .pt file that holds the weights, 'a.b' if nested")
    prefix: str = Field(default="", description="what to remove from the beginning of the weights' names")
    inputs: tuple[str, ...] | None = Field(
        default=None, description="the forward's arguments for what a row gives, in order; what has no name is left out"
    )

    @field_validator("sha256")
    @classmethod
    def _is_as_sha256sum_prints_it(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch("[0-9a-f]{64}", value):
            raise PydanticCustomError("misfit", "64 hexadecimal digits, as sha256sum prints them")
        return value

    @field_validator("auto")
    @classmethod
    def _is_automatic(cls, value: str) -> str:
        if not value.startswith("AutoModel"):
            raise PydanticCustomError("misfit", "'AutoModel…', a class of transformers")
        return value

    @field_validator("builder", "timm")
    @classmethod
    def _only_one_architecture(cls, value: str | None, info: ValidationInfo) -> str | None:
        others = [name for name in ("family", "builder") if info.data.get(name) is not None]
        if value is not None and others:
            raise PydanticCustomError("misfit", f"it only without {others[0]}")
        return value

    @field_validator("builder")
    @classmethod
    def _names_module_and_object(cls, value: str | None) -> str | None:
        if value is not None and value.count(":") != 1:
            raise PydanticCustomError("misfit", "'package.module:name'")
        return value

    @property
    def identity(self) -> dict[str, Any]:
        """How the models are built, as JSON values: where the files are is not part of it."""
        return self.model_dump(mode="json", exclude={"url", "sha256"})

    def model_id(self, sha256: str, *, family_version: int | None = None) -> str:
        """Name of the model with weights of that digest."""
        return digest(["loaded", LOAD_VERSION, sha256, self.identity, family_version])
