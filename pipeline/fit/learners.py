"""Models that learn at the same time, each as if it were alone.

Layer 2: single-device PyTorch. Models of one shape are stacked and run at once: their steps cost the kernels of one
model, larger. A model's weights are the same to the bit in any such group. That holds where every model's part of
every tensor fills whole cache lines: a matrix product then chooses its kernel by the shape alone, and no vectorised
loop ends within a model (measured: MKL's batched product gives other bits for parts of 7 × 13 numbers, from their
addresses alone). What does not fit that, and modules that draw random numbers or keep statistics, learn alone; so does
what learns in lower precision, whose loss is scaled for each model apart. On a GPU the last bits depend on the group.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from pipeline.batch import Batch
from pipeline.fit.objective import losses, predictions, targets
from pipeline.fit.rows import take
from pipeline.fit.settings import Training
from pipeline.models.base import Family

# what of a loss scale changes as a model learns, by PyTorch's names
SCALER = ("scale", "_growth_tracker")
# numbers that surely fill a cache line of 64 bytes
LINE = 16

State = dict[str, torch.Tensor]


def can_stack(family: Family, model: nn.Module, training: Training) -> bool:
    """Whether models of this shape can learn together without any of them changing by a bit."""
    random = any(isinstance(one, nn.modules.dropout._DropoutNd) and one.p > 0 for one in model.modules())
    matrices = [value.shape for value in model.parameters() if value.ndim > 1]
    return (
        family.stacks
        and not random
        and not list(model.buffers())
        and training.autocast == "none"
        and training.batch_rows % LINE == 0
        and all(shape.numel() % LINE == 0 and min(shape) > 1 for shape in matrices)
    )


class Learners(ABC):
    """G models that make each step together, with their optimizer."""

    optimizer: torch.optim.Optimizer

    @abstractmethod
    def losses(self, window: Batch, index_GN: torch.Tensor | None) -> torch.Tensor:
        """The loss of each model (G,) on its rows of the window, all of them without an index; sets the gradients."""

    @abstractmethod
    def clip(self, norm: float) -> None:
        """Shorten each model's gradient to at most this norm."""

    @abstractmethod
    def module(self, state: State) -> nn.Module:
        """A model in eval mode with the weights of a state, until the next call; it is not one of those that learn."""

    @abstractmethod
    def state(self, model: int) -> State:
        """A copy of everything that a model's next steps depend on."""

    @abstractmethod
    def restore(self, states: Sequence[State]) -> None:
        """Go on from a state of each model, all of the same step."""

    def update(self, share: float) -> None:
        """Follow the gradients, at this share of the learning rates."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["full_rate"] * share
        self.step()

    def step(self) -> None:
        """Have the optimizer follow the gradients."""
        self.optimizer.step()


def optimizer_of(groups: Sequence[tuple[Sequence[torch.Tensor], Training]]) -> torch.optim.Optimizer:
    """PyTorch's optimizer over groups of parameters, each with its own learning rate and weight decay."""
    listed = [
        {"params": list(values), "full_rate": one.learning_rate, "weight_decay": one.weight_decay}
        for values, one in groups
    ]
    training = groups[0][1]
    # the fused SGD of torch 2.13 begins with any momentum where a scaled loss has its first step left out
    fused = training.autocast != "float16"
    if training.optimizer == "adamw":
        return torch.optim.AdamW(listed, betas=(training.beta1, training.beta2), fused=fused)
    return torch.optim.SGD(listed, lr=training.learning_rate, momentum=training.momentum, fused=fused)


class Single(Learners):
    """One model, as PyTorch trains it. It draws from the default generator, which is part of its state."""

    def __init__(self, family: Family, model: nn.Module, training: Training) -> None:
        self.family, self.model, self.training = family, model, training
        self.shown = copy.deepcopy(model)
        self.device = next(model.parameters()).device
        self.optimizer = optimizer_of([(list(model.parameters()), training)])
        # gradients of float16 soon are too small for it (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=training.autocast == "float16")

    def losses(self, window: Batch, index_GN: torch.Tensor | None) -> torch.Tensor:
        """The loss (1,) on the rows of its only index."""
        self.model.train()
        batch = window if index_GN is None else take(window, index_GN[0])
        with self._precision():
            logits = predictions(self.family, batch.forward(self.model))
        loss_G = losses(_wide(logits)[None], targets(self.family, batch)[None], self.training.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss_G.sum()).backward()
        return loss_G.detach()

    def _precision(self) -> AbstractContextManager[Any]:
        if self.training.autocast == "none":
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.training.autocast))

    def clip(self, norm: float) -> None:
        """Shorten the gradient to at most this norm."""
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), norm)

    def step(self) -> None:
        """Follow the gradient; one that overflowed is left out, and the loss is scaled less from then on."""
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def module(self, state: State) -> nn.Module:
        """A copy of the model with the state's weights."""
        self.shown.load_state_dict(below(state, "weights"))
        return self.shown.eval()

    def state(self, model: int) -> State:
        """Weights, buffers, the optimizer's memory, the loss scale, and the state of the default generator."""
        slots = self.optimizer.state_dict()["state"]
        found = {f"weights.{name}": value for name, value in self.model.state_dict().items()}
        found |= {f"slot.{number}.{name}": value for number, slot in slots.items() for name, value in slot.items()}
        found |= {f"random.{name}": value for name, value in _random_state(self.device).items()}
        scaled = self.scaler.state_dict()
        found |= {f"scaler.{name}": torch.tensor(scaled[name]) for name in SCALER if name in scaled}
        return {name: value.detach().clone() for name, value in found.items()}

    def restore(self, states: Sequence[State]) -> None:
        """Take over weights, memory, loss scale and random numbers; on another device these are not the same ones."""
        (state,) = states
        self.model.load_state_dict(below(state, "weights"))
        slots: dict[int, State] = {}
        for name, value in below(state, "slot").items():
            number, _, slot = name.partition(".")
            slots.setdefault(int(number), {})[slot] = value.clone()
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})
        if scaled := {name: value.item() for name, value in below(state, "scaler").items()}:
            self.scaler.load_state_dict(self.scaler.state_dict() | scaled)
        torch.set_rng_state(state["random.cpu"])
        if "random.cuda" in state and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random.cuda"], self.device)


class Stack(Learners):
    """Models of one shape, stacked. Each parameter is one matrix whose rows, a model each, fill whole cache lines.

    Only parameters of other sizes (biases) are filled up: the gradients of the others go to the optimizer as they are.
    """

    def __init__(self, family: Family, models: Sequence[nn.Module], trainings: Sequence[Training]) -> None:
        self.family, self.training, self.skeleton = family, trainings[0], models[0]
        self.shapes = {name: value.shape for name, value in self.skeleton.named_parameters()}
        self.rows = {
            name: torch.stack([_filled(model.get_parameter(name).detach().flatten()) for model in models])
            for name in self.shapes
        }
        self.leaves = {name: self._shaped(name, value).requires_grad_() for name, value in self.rows.items()}
        self.forward = family.stacked(self.skeleton)
        # models with equal rates are one group, and of each parameter their rows one tensor
        self.runs = list(_equal_rates(trainings))
        self.parts = [{name: value[run].requires_grad_() for name, value in self.rows.items()} for run in self.runs]
        listed = zip(self.runs, self.parts, strict=True)
        self.optimizer = optimizer_of([(list(part.values()), trainings[run.start]) for run, part in listed])

    def _shaped(self, name: str, row: torch.Tensor) -> torch.Tensor:
        shape = self.shapes[name]
        return row[..., : shape.numel()].unflatten(-1, shape) if shape else row[..., 0]

    def losses(self, window: Batch, index_GN: torch.Tensor | None) -> torch.Tensor:
        """The loss of each model on its own rows."""
        assert index_GN is not None
        batch = take(window, index_GN)
        logits = predictions(self.family, self.forward(self.leaves, batch.inputs, dict(batch.kwargs)))
        loss_G = losses(logits, targets(self.family, batch), self.training.label_smoothing)
        found = torch.autograd.grad(loss_G.sum(), list(self.leaves.values()))
        for name, gradient in zip(self.leaves, found, strict=True):
            self._hand_over(name, _filled(gradient.flatten(1)))
        return loss_G.detach()

    def _hand_over(self, name: str, gradient: torch.Tensor) -> None:
        for run, part in zip(self.runs, self.parts, strict=True):
            part[name].grad = gradient[run]

    def clip(self, norm: float) -> None:
        """Shorten each model's gradient to at most this norm."""
        for part in self.parts:
            gradients = [value.grad for value in part.values() if value.grad is not None]
            # added one by one: a reduction over them would take another order for one model than for many
            square_G = sum(torch.linalg.vector_norm(one, dim=1).square() for one in gradients)
            share_G = (norm / (torch.as_tensor(square_G).sqrt() + 1e-6)).clamp(max=1.0)
            for one in gradients:
                one.mul_(share_G[:, None])

    def module(self, state: State) -> nn.Module:
        """The first model's module with the state's weights."""
        self.skeleton.load_state_dict(below(state, "weights"))
        return self.skeleton.eval()

    def state(self, model: int) -> State:
        """The model's weights and its rows of everything that the optimizer remembers."""
        found = {f"weights.{name}": self._shaped(name, value[model]) for name, value in self.rows.items()}
        run, part = next(one for one in zip(self.runs, self.parts, strict=True) if one[0].start <= model < one[0].stop)
        for name, value in part.items():
            for slot, memory in self.optimizer.state[value].items():
                found[f"slot.{name}.{slot}"] = memory[model - run.start] if memory.ndim == 2 else memory
        return {name: value.detach().clone() for name, value in found.items()}

    @torch.no_grad()
    def restore(self, states: Sequence[State]) -> None:
        """Take over each model's weights and rows of memory."""
        for name, value in self.rows.items():
            value.copy_(torch.stack([_filled(state[f"weights.{name}"].flatten()) for state in states]))
        for run, part in zip(self.runs, self.parts, strict=True):
            for name, value in part.items():
                slots = [below(state, f"slot.{name}") for state in states[run]]
                self.optimizer.state[value] = {
                    slot: (torch.stack([one[slot] for one in slots]) if memory.ndim else memory).to(value.device)
                    for slot, memory in slots[0].items()
                }


def _filled(flat: torch.Tensor) -> torch.Tensor:
    """The last axis with zeros up to the end of a cache line."""
    missing = -flat.shape[-1] % LINE
    return functional.pad(flat, (0, missing)) if missing else flat


def _random_state(device: torch.device) -> State:
    cuda = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"cpu": torch.get_rng_state(), **cuda}


def _equal_rates(trainings: Sequence[Training]) -> Iterator[slice]:
    """Runs of neighbours with the same learning rate and weight decay."""
    start = 0
    for _, run in groupby(trainings, key=lambda one: (one.learning_rate, one.weight_decay)):
        stop = start + len(list(run))
        yield slice(start, stop)
        start = stop


def below(state: Mapping[str, torch.Tensor], prefix: str) -> State:
    """The part of a state whose names begin with "prefix.", without it."""
    return {name.removeprefix(f"{prefix}."): value for name, value in state.items() if name.startswith(f"{prefix}.")}


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
