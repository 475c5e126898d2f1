"""The job's `training` table: what decides the weights besides family, data and seed.

Layer 2: imports nothing of the pipeline.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

# of steps and of rows: far beyond what anyone waits for, and every column and counter holds it
MOST = 2**31 - 1


class Training(BaseModel):
    """How a model is trained. A step is one update by the gradient of `batch_rows` rows."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    optimizer: Literal["sgd", "adamw"] = Field(default="sgd", description="SGD with momentum, or AdamW")
    steps: int = Field(default=1000, ge=1, le=MOST, description="updates")
    batch_rows: int = Field(
        default=32, ge=1, le=MOST, description="rows of one update; of a graph all nodes, or the drawn ones"
    )
    learning_rate: float = Field(default=0.1, gt=0, description="the greatest of its schedule")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="of SGD")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="of AdamW: memory of the gradient")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="of AdamW: memory of its square")
    weight_decay: float = Field(default=5e-4, ge=0, description="as the optimizer defines it, of every parameter")
    schedule: Literal["constant", "cosine", "step"] = Field(default="constant", description="of the learning rate")
    warmup_steps: int = Field(default=0, ge=0, description="steps over which the learning rate rises from 0")
    decay_steps: tuple[int, ...] = Field(
        default=(), strict=False, validate_default=True, description="of schedule 'step': where it falls"
    )
    decay: float = Field(default=0.1, gt=0, lt=1, description="of schedule 'step': to which share it falls there")
    clip_norm: float | None = Field(default=None, gt=0, description="greatest norm of a gradient")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="share of the target spread over all classes")
    autocast: Literal["none", "bfloat16", "float16"] = Field(
        default="none", description="lower precision of the forward, 'float16' with a scaled loss; models learn alone"
    )
    checkpoints: tuple[int, ...] = Field(default=(), strict=False, description="steps to keep besides 0 and the last")
    neighbours: tuple[int, ...] = Field(
        default=(), strict=False, description="of graphs: neighbours drawn of a node at each step away; none: all"
    )
    shuffle_rows: int = Field(
        default=65_536, ge=1, le=MOST, description="rows held in memory to draw from, 1 GiB at most"
    )
    held_out: float = Field(default=0.0, ge=0, lt=1, description="share of the training rows to stop early by")
    evaluate_steps: int = Field(
        default=100, ge=1, le=MOST, description="steps between two looks at the held-out rows, or at 4,096 of them"
    )
    patience: int | None = Field(
        default=None, ge=1, description="looks without a new least loss after which training ends with the best weights"
    )

    @field_validator("warmup_steps")
    @classmethod
    def _warms_up_within_the_training(cls, value: int, info: ValidationInfo) -> int:
        if value > info.data.get("steps", value):
            raise PydanticCustomError("misfit", f"at most steps = {info.data['steps']}")
        return value

    @field_validator("decay_steps")
    @classmethod
    def _has_steps_to_decay_at(cls, value: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        # what is not there is wrong itself
        if "schedule" in info.data and bool(value) != (info.data["schedule"] == "step"):
            raise PydanticCustomError("misfit", "steps in rising order with schedule = 'step', and none without")
        return _rising(value, info)

    @field_validator("checkpoints")
    @classmethod
    def _checkpoints_lie_between(cls, value: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        return _rising(value, info)

    @field_validator("neighbours")
    @classmethod
    def _draws_some(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(count < 1 for count in value):
            raise PydanticCustomError("misfit", "numbers of neighbours from 1")
        return value

    @field_validator("patience")
    @classmethod
    def _has_rows_to_stop_by(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and not info.data.get("held_out", True):
            raise PydanticCustomError("misfit", "held_out above 0 with it")
        return value


def _rising(value: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
    last = info.data.get("steps", MOST + 1)
    if not all(left < right for left, right in pairwise((0, *value, last))):
        raise PydanticCustomError("misfit", f"steps in rising order between 0 and steps = {last}")
    return value
