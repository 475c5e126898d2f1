"""Recurrent layers against an explicit recurrence in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from pipeline.flow.discover import discover
from pipeline.flow.tap import tapped_forward
from tests.flow.models import Free, linear, numbers
from tests.flow.shown import batch_of, show

GATES = {"LSTM": "ifgo", "GRU": ["r", "z", "n_input", "n_hidden"], "RNN": "h"}


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def step(kind: str, weights: list[np.ndarray], x: np.ndarray, h: np.ndarray, c: np.ndarray):
    """One step of one layer: the z of every gate, h and c."""
    w, u, b, d = weights
    from_x, from_h = x @ w.T + b, h @ u.T + d
    if kind == "LSTM":
        i, f, g, o = np.split(from_x + from_h, 4, -1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        return {"i": i, "f": f, "g": g, "o": o}, sigmoid(o) * np.tanh(c), c
    if kind == "GRU":
        (r, z, n), (r_h, z_h, n_h) = np.split(from_x, 3, -1), np.split(from_h, 3, -1)
        candidate = np.tanh(n + sigmoid(r + r_h) * n_h)
        h = (1 - sigmoid(z + z_h)) * candidate + sigmoid(z + z_h) * h
        return {"r": r + r_h, "z": z + z_h, "n_input": n, "n_hidden": n_h}, h, c
    return {"h": from_x + from_h}, np.tanh(from_x + from_h), c


def unrolled(layer: nn.RNNBase, x: np.ndarray) -> dict[str, np.ndarray]:
    """z (N, T, H) of every gate of every layer and direction; x is (N, T, D)."""
    kind, found = type(layer).__name__, {}
    for number in range(layer.num_layers):
        outs = []
        for suffix in ("", "_reverse")[: 2 if layer.bidirectional else 1]:
            names = [f"{part}_l{number}{suffix}" for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
            weights = [getattr(layer, name).detach().numpy() for name in names]
            h = c = np.zeros((len(x), layer.hidden_size))
            order = range(x.shape[1])[:: -1 if suffix else 1]
            zs, hs = {}, {}
            for t in order:
                z, h, c = step(kind, weights, x[:, t], h, c)
                hs[t] = h
                for gate, value in z.items():
                    zs.setdefault(gate, {})[t] = value
            for gate, by_time in zs.items():
                found[f"l{number}{suffix}.{gate}"] = np.stack([by_time[t] for t in sorted(by_time)], 1)
            outs.append(np.stack([hs[t] for t in sorted(hs)], 1))
        x = np.concatenate(outs, -1)
    return found


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.sampled_from(["LSTM", "GRU", "RNN"]),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
    st.integers(1, 5),
)
def test_every_gate_is_the_explicit_recurrence(kind, layers, inputs, hidden, bidirectional, batch_first, length):
    layer = getattr(nn, kind)(
        inputs, hidden, layers, bidirectional=bidirectional, batch_first=batch_first, dtype=torch.float64
    )
    x = numbers(6, length, inputs)
    shown = show(layer, batch_of(x if batch_first else x.transpose(0, 1), rows=6))
    expected = unrolled(layer, x.numpy())
    assert {site.name for site in shown.discovery.sites} == set(expected)
    for site in shown.discovery.sites:
        np.testing.assert_allclose(shown.z[site.name], expected[site.name], atol=1e-12)
        explained = shown.x[site.name][:, :, 0] @ site.pattern_UD.T + site.bias_U
        np.testing.assert_allclose(explained, expected[site.name], atol=1e-12)
        assert site.kind == kind.lower()
        assert (site.gate == "null") == site.name.endswith(("n_input", "n_hidden"))
    assert shown.discovery.unread == ()


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_packed_sequences_show_only_what_is_there(kind):
    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out, _ = pad_packed_sequence(self.r(packed)[0], batch_first=True)
        return self.head(out)

    layer = getattr(nn, kind)(3, 4, 2, bidirectional=True, batch_first=True, dtype=torch.float64)
    model = Free(forward, r=layer, head=linear(8, 2))
    x, lengths = numbers(4, 5, 3), torch.tensor([2, 5, 1, 3])
    shown = show(model, batch_of(x, lengths, mask_NS=torch.arange(5) < lengths[:, None]))
    assert not any(site.note and "masked" in site.note for site in shown.discovery.sites)
    assert len(shown.z["head"][shown.last["head"].mask_LS]) == 11
    for row, length in enumerate(lengths.tolist()):
        alone = unrolled(layer, x[row : row + 1, :length].numpy())
        for name, z in alone.items():
            last = shown.last[f"r.{name}"]
            mine = last.row_L == row
            assert int(mine.sum()) == length
            assert last.position_LS[mine][:, 0].tolist() == list(range(length))
            np.testing.assert_allclose(shown.z[f"r.{name}"][mine][:, 0], z[0], atol=1e-12)


def test_a_projected_state_is_a_site_too():
    layer = nn.LSTM(3, 5, proj_size=2, batch_first=True, dtype=torch.float64)
    shown = show(layer, batch_of(numbers(4, 6, 3)))
    site = shown.site("l0.projection")
    assert (site.units, site.fan_in, site.gate) == (2, 5, "identity")
    torch.testing.assert_close(shown.z["l0.projection"], shown.out[0])
    torch.testing.assert_close(shown.x["l0.projection"][:, :, 0] @ layer.weight_hr_l0.detach().T, shown.out[0])


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_cells_in_a_loop_are_one_site(kind):
    cell = getattr(nn, f"{kind}Cell")(3, 4, dtype=torch.float64)

    def forward(self, x):
        state = (torch.zeros(4, 4, dtype=x.dtype),) * 2 if kind == "LSTM" else torch.zeros(4, 4, dtype=x.dtype)
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return state

    layer = getattr(nn, kind)(3, 4, batch_first=True, dtype=torch.float64)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        getattr(layer, f"{name}_l0").data = getattr(cell, name).data
    model, x = Free(forward, cell=cell), numbers(4, 6, 3)
    probe = batch_of(x[:, :2])  # the probe is shorter: the number of calls may vary
    shown = show(model, batch_of(x), probe=probe)
    assert len(shown.discovery.sites) == len(GATES[kind])
    expected = unrolled(layer, x.numpy())
    for name, z in expected.items():
        gate = f"cell.{name.partition('.')[2]}"
        last = shown.last[gate]
        assert shown.calls[gate] == 1
        order = last.row_L * 6 + last.position_LS[:, 0]
        np.testing.assert_allclose(shown.z[gate][:, 0][order.argsort()].view(4, 6, -1), z, atol=1e-12)
        torch.testing.assert_close(last.patches(3, 9), last.patches(0, 24)[3:9])
        assert last.input_sums().sum_LSG.shape == (24, 1, 1)


@pytest.mark.parametrize("form", ["attribute", "dictionary", "list"])
def test_a_state_carried_between_calls_is_data(form):
    class Carrying(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.carry = linear(3, 4), linear(4, 4)
            first = torch.zeros(5, 4, dtype=torch.float64)
            self.state = {"attribute": first, "dictionary": {0: first}, "list": [first]}[form]

        def forward(self, x):
            state = self.state if form == "attribute" else self.state[0]
            state = torch.tanh(self.enter(x) + self.carry(state))
            if form == "attribute":
                self.state = state
            else:
                self.state[0] = state
            return state

    model, x = Carrying(), numbers(5, 3)
    shown = show(model, batch_of(x))
    assert [site.name for site in shown.discovery.sites] == ["enter", "carry"]
    assert not shown.x["carry"].any()  # what discovery left behind was put back
    torch.testing.assert_close(shown.out, torch.tanh(model.enter(x) + model.carry.bias))


def test_steps_that_are_as_many_as_the_rows_are_not_taken_for_them():
    """(5, 5, 3) of five rows may have its rows along either axis: the first is assumed, and here it is the time."""
    layer = nn.LSTM(3, 4, dtype=torch.float64)
    found = discover(layer, batch_of(numbers(5, 5, 3)))
    assert found.sites == ()
    assert len(found.unread) == 4
    assert all("cannot be followed" in unread.reason for unread in found.unread)
    known = discover(layer, batch_of(numbers(6, 5, 3), rows=5))
    seen = []
    tapped_forward(layer, known, batch_of(numbers(5, 5, 3), rows=5), lambda p: seen.append(p.row_L))
    assert len(seen) == 4


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell", "packed"])
def test_a_batch_of_one_row_shows_the_same_sites(kind):
    def forward(self, x):
        if kind != "packed":
            return self.cell(x[:, 0])[0]
        lengths = torch.arange(len(x)) % 3 + 1
        return self.cell(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))[1][0]

    cell = nn.LSTM(6, 5, batch_first=True) if kind == "packed" else getattr(nn, kind)(6, 5)
    model, x = Free(forward, cell=cell.double()), numbers(5, 3, 6)
    by_one, whole = show(model, batch_of(x), probe=batch_of(x[:1])), show(model, batch_of(x))
    assert [site.name for site in by_one.discovery.sites] == [site.name for site in whole.discovery.sites]
    assert by_one.z.keys() == whole.z.keys()
    for name, z in whole.z.items():
        torch.testing.assert_close(by_one.z[name], z)
        assert by_one.last[name].row_index_L.tolist() == whole.last[name].row_index_L.tolist()
