"""Recurrent layers as sites: one per gate, x = [x_t; h_{t−1}], replayed in plain torch from what the call was given.

Layer 1. The model's own operation is run layer by layer, which gives every h; z follows by two products. The check
rebuilds h from z and compares it with what the operation returned.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from pipeline.flow.values import Call

LAYERED = frozenset(("lstm", "gru", "rnn_tanh", "rnn_relu"))
SINGLE = frozenset(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"))


class Weights(NamedTuple):
    """The weights of one layer in one direction; None where there is no bias or no projection."""

    layer: int
    reverse: bool
    input: Any
    hidden: Any
    input_bias: Any
    hidden_bias: Any
    projection: Any


class Gating(NamedTuple):
    """One site of a layer: the block of its units among the gates, and which of x and h it multiplies."""

    label: str
    block: int
    gate: str
    sees_input: bool = True
    sees_hidden: bool = True


@dataclass(frozen=True)
class CellPart:
    """Which site of which layer and direction a plan is; label "projection" for a projected hidden state."""

    layer: int
    reverse: bool
    gating: Gating


_CANDIDATE = "null"
GATINGS: dict[str, tuple[Gating, ...]] = {
    "lstm": (
        Gating("i", 0, "sigmoid"),
        Gating("f", 1, "sigmoid"),
        Gating("g", 2, "tanh"),
        Gating("o", 3, "sigmoid"),
    ),
    "gru": (
        Gating("r", 0, "sigmoid"),
        Gating("z", 1, "sigmoid"),
        Gating("n_input", 2, _CANDIDATE, sees_hidden=False),
        Gating("n_hidden", 2, _CANDIDATE, sees_input=False),
    ),
    "rnn_tanh": (Gating("h", 0, "tanh"),),
    "rnn_relu": (Gating("h", 0, "relu"),),
}
CANDIDATE_NOTE = "the candidate is tanh(n_input + r · n_hidden): neither half meets a gate of its own"
PROJECTION = Gating("projection", 0, "identity")


def family(name: str) -> str:
    """lstm, gru, rnn_tanh or rnn_relu, of a layer's or a cell's operation."""
    return name.removesuffix("_cell")


def is_recurrent(name: str) -> bool:
    """Whether an operation is a recurrent layer or cell."""
    return name in LAYERED or name in SINGLE


def weights_of(name: str, args: Sequence[Any]) -> list[Weights]:
    """The weights of a recurrent operation's arguments, recorded or live, in order."""
    if name in SINGLE:
        input_weight, hidden, input_bias, hidden_bias = (*args[2:6], None, None)[:4]
        return [Weights(0, False, input_weight, hidden, input_bias, hidden_bias, None)]
    packed = _is_packed(args)
    has_biases, layers, bidirectional = _options(args, packed)
    parameters, directions = args[3 if packed else 2], 2 if bidirectional else 1
    per = len(parameters) // (layers * directions)
    made = []
    for index in range(layers * directions):
        given = list(parameters[index * per : (index + 1) * per])
        input_bias, hidden_bias = given[2:4] if has_biases else (None, None)
        projection = given[-1] if per > (4 if has_biases else 2) else None
        layer, reverse = divmod(index, directions)
        made.append(Weights(layer, reverse == 1, given[0], given[1], input_bias, hidden_bias, projection))
    return made


def _is_packed(args: Sequence[Any]) -> bool:
    # .data: (data, batch_sizes, hx, params, …); .input: (input, hx, params, …)
    return len(args) > 3 and isinstance(args[3], list | tuple)


def _options(args: Sequence[Any], packed: bool) -> tuple[bool, int, bool]:
    first = 4 if packed else 3
    return args[first], args[first + 1], args[first + 4]


def time_axis(name: str, args: Sequence[Any]) -> int | None:
    """The axis of the steps in a layer's input; None where steps and rows lie along one, or for a cell."""
    return None if name in SINGLE or _is_packed(args) else int(args[8])


def cell_path(names: Sequence[str], weights: Weights) -> tuple[str, str]:
    """The module path and the layer's label, from the names of the input weight.

    >>> cell_path(["enc.lstm.weight_ih_l1_reverse"], Weights(1, True, None, None, None, None, None))
    ('enc.lstm', '.l1_reverse')
    """
    path, _, name = sorted(names)[0].rpartition(".")
    found = re.search(r"_(l\d+(?:_reverse)?)$", name)
    if found:
        return path, f".{found[1]}"
    return path or name, "" if name == "weight_ih" else f".l{weights.layer}{'_reverse' if weights.reverse else ''}"


@dataclass(frozen=True, eq=False)
class Replay:
    """One layer in one direction: what it was given at each step, all its gates' z, and the h it returned.

    x_D, hidden_D (h_{t−1}), out_D (h_t) and the products of all gates have the leading axes of the call's input; the
    `steps` are the entries of each step along `time`, in the order of the recurrence; c_0 is (N, H).
    """

    weights: Weights
    x_D: torch.Tensor
    hidden_D: torch.Tensor
    input_GH: torch.Tensor
    from_hidden_GH: torch.Tensor
    out_D: torch.Tensor
    c_0: torch.Tensor | None
    steps: Sequence[torch.Tensor]
    time: int

    @property
    def z_GH(self) -> torch.Tensor:
        """The sum of both products: the input of every gate but a GRU's candidate."""
        return self.input_GH + self.from_hidden_GH


def replays(call: Call, out: Any) -> Iterator[Replay]:
    """Every layer and direction of a call, in order; `out` is what the call returned."""
    if call.op.name in SINGLE:
        yield _single(call, out[0] if isinstance(out, list | tuple) else out)
        return
    packed = _is_packed(call.args)
    x, states = call.args[0], call.args[2 if packed else 1]
    for layer in range(_options(call.args, packed)[1]):
        here = [one for one in weights_of(call.op.name, call.args) if one.layer == layer]
        first = layer * len(here)
        own = _chosen_states(call.op.name, states, slice(first, first + len(here)))
        out = _layer(call, x, own, here, packed)
        size = out.shape[-1] // len(here)
        for direction, one in enumerate(here):
            part = out[..., direction * size : (direction + 1) * size]
            yield _replay(call, one, x, part, [state[direction] for state in own], packed)
        x = out


def _chosen_states(name: str, states: Any, chosen: slice) -> list[torch.Tensor]:
    return [state[chosen] for state in (states if name == "lstm" else [states])]


def _layer(call: Call, x: torch.Tensor, states: list[torch.Tensor], here: list[Weights], packed: bool) -> torch.Tensor:
    """What one layer of the call returns: the model's own operation on that layer alone."""
    parts = [(one.input, one.hidden, one.input_bias, one.hidden_bias, one.projection) for one in here]
    parameters = [part for weights in parts for part in weights if part is not None]
    given = states if call.op.name == "lstm" else states[0]
    rest = (parameters, here[0].input_bias is not None, 1, 0.0, False, len(here) == 2)
    if packed:
        return call.func(x, call.args[1], given, *rest)[0]  # type: ignore[no-any-return]
    return call.func(x, given, *rest, call.args[8])[0]  # type: ignore[no-any-return]


def _replay(
    call: Call, one: Weights, x: torch.Tensor, out: torch.Tensor, first: list[torch.Tensor], packed: bool
) -> Replay:
    time = 0 if packed or not call.args[8] else 1
    along = out.movedim(time, 0)
    hidden = torch.empty_like(along)
    steps = _packed_steps(call.args[1]) if packed else [torch.tensor(step) for step in range(len(along))]
    steps = steps[::-1] if one.reverse else steps
    for at, before in zip(steps, [None, *steps[:-1]], strict=True):
        _fill(hidden, along, at, before, first[0])
    c_0 = first[1] if len(first) > 1 else None
    return _multiplied(one, x, hidden.movedim(0, time), out, c_0=c_0, steps=steps, time=time)


def _fill(
    hidden: torch.Tensor, out: torch.Tensor, at: torch.Tensor, before: torch.Tensor | None, h_0: torch.Tensor
) -> None:
    """h_{t−1} at one step: what the step before returned, and the first state for sequences that begin here."""
    if at.dim() == 0:
        hidden[at] = h_0 if before is None else out[before]
        return
    hidden[at] = h_0[: len(at)]
    if before is not None:
        shared = min(len(at), len(before))
        hidden[at[:shared]] = out[before[:shared]]


def _packed_steps(batch_sizes: torch.Tensor) -> list[torch.Tensor]:
    ends = batch_sizes.cumsum(0).tolist()
    return [torch.arange(end - size, end) for end, size in zip(ends, batch_sizes.tolist(), strict=True)]


def _single(call: Call, out: torch.Tensor) -> Replay:
    (one,) = weights_of(call.op.name, call.args)
    states = call.args[1]
    hidden, c_0 = (states[0], states[1]) if isinstance(states, list | tuple) else (states, None)
    steps = [torch.arange(len(hidden))]
    return _multiplied(one, call.args[0], hidden, out, c_0=c_0, steps=steps, time=0)


def _multiplied(
    one: Weights,
    x: torch.Tensor,
    hidden: torch.Tensor,
    out: torch.Tensor,
    *,
    c_0: torch.Tensor | None,
    steps: Sequence[torch.Tensor],
    time: int,
) -> Replay:
    from_input = functional.linear(x, one.input, one.input_bias)
    from_hidden = functional.linear(hidden, one.hidden, one.hidden_bias)
    return Replay(one, x, hidden, from_input, from_hidden, out, c_0, steps, time)


def states_of(name: str, replay: Replay) -> torch.Tensor:
    """h_t, before any projection, rebuilt from the gates' z alone."""
    if name == "gru":
        r, update, from_input = replay.input_GH.chunk(3, -1)
        r_h, update_h, from_hidden = replay.from_hidden_GH.chunk(3, -1)
        candidate = torch.tanh(from_input + torch.sigmoid(r + r_h) * from_hidden)
        kept = torch.sigmoid(update + update_h)
        return (1 - kept) * candidate + kept * replay.hidden_D
    z_GH = replay.z_GH
    if name != "lstm":
        return torch.tanh(z_GH) if name == "rnn_tanh" else torch.relu(z_GH)
    i, f, g, o = z_GH.movedim(replay.time, 0).chunk(4, -1)
    made, forgets, cell = torch.sigmoid(i) * torch.tanh(g), torch.sigmoid(f), torch.empty_like(i)
    before = replay.c_0
    for at in replay.steps:
        assert before is not None
        cell[at] = made[at] + forgets[at] * _of_step(before, replay.c_0, at)
        before = cell[at]
    return (torch.sigmoid(o) * torch.tanh(cell)).movedim(0, replay.time)


def _of_step(before: torch.Tensor, c_0: torch.Tensor | None, at: torch.Tensor) -> torch.Tensor:
    # sequences end (forward) or begin (reverse) at the tail of a packed step
    if at.dim() == 0 or len(before) >= len(at) or c_0 is None:
        return before if at.dim() == 0 else before[: len(at)]
    return torch.cat([before, c_0[len(before) : len(at)]])
