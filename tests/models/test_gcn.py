from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.errors import DataError, ModelError
from pipeline.measure import measure
from pipeline.models.base import Neighbourhoods, Task
from pipeline.models.gcn import FAMILY, GCNParameters, normalised_adjacency
from pipeline.registry import statistics
from tests.models.build import build, disturbed, on_meta, parameters

NODES = 12


def edges(count: int = 20) -> torch.Tensor:
    return torch.randint(NODES, (2, count), generator=torch.Generator().manual_seed(1))


def dense(edge: torch.Tensor, nodes: int) -> np.ndarray:
    adjacency = np.zeros((nodes, nodes))
    for source, target in edge.T.tolist():
        adjacency[source, target] = adjacency[target, source] = 1
    np.fill_diagonal(adjacency, 1)
    root = np.diag(adjacency.sum(1) ** -0.5)
    return root @ adjacency @ root


def test_the_papers_cora_model_has_its_size() -> None:
    # 1,433 words, 7 classes, 16 hidden units, no biases
    assert parameters(on_meta("gcn", Task((1433,), 7))) == 1433 * 16 + 16 * 7 == 23_040


def test_the_adjacency_is_the_papers() -> None:
    edge = torch.cat([edges(), edges()[:, :3].flip(0), torch.tensor([[5], [5]])], 1)  # repeated, both ways, a self-loop
    made = normalised_adjacency(edge, NODES + 1, torch.float64).to_dense().numpy()  # one node without an edge
    np.testing.assert_allclose(made, dense(edge, NODES + 1), rtol=1e-15, atol=0)


def test_no_edge_at_all_gives_the_identity() -> None:
    assert torch.equal(
        normalised_adjacency(torch.empty(2, 0, dtype=torch.int64), 3, torch.float32).to_dense(), torch.eye(3)
    )


@pytest.mark.parametrize("bias", [False, True])
def test_forward_is_the_papers(bias: bool) -> None:
    model = disturbed(build("gcn", Task((5,), 3), widths=(6, 4), bias=bias)).double()
    x, edge = torch.randn(NODES, 5, dtype=torch.float64), edges()
    adjacency, hidden = dense(edge, NODES), x.numpy()
    for layer in range(3):
        weight = model.get_parameter(f"layers.{layer}.weight").detach().numpy()
        hidden = adjacency @ (hidden @ weight.T)  # the authors' order
        if bias:
            hidden = hidden + model.get_parameter(f"layers.{layer}.bias").detach().numpy()
        if layer < 2:
            hidden = np.maximum(hidden, 0)
    np.testing.assert_allclose(model(x, edge).detach().numpy(), hidden, rtol=1e-12, atol=1e-12)


def test_prepared_inputs_give_the_same_bits_and_gradients() -> None:
    model = build("gcn", Task((5,), 3))
    inputs = (torch.randn(NODES, 5), edges())
    made = []
    for given in (inputs, FAMILY.prepare(inputs)):
        model.zero_grad()
        out = model(*given)
        out.square().sum().backward()
        made.append((out, model.get_parameter("layers.0.weight").grad.clone()))
    assert all(torch.equal(left, right) for left, right in zip(*made, strict=True))


def test_a_node_is_reached_by_its_neighbours_only() -> None:
    model = build("gcn", Task((5,), 3), widths=(8, 8))  # three layers: three steps
    path = torch.stack([torch.arange(NODES - 1), torch.arange(1, NODES)])
    x = torch.randn(NODES, 5)
    other = x.clone()
    other[0] += 1
    changed = (model(x, path) != model(other, path)).any(1)
    assert changed.tolist() == [node <= 3 for node in range(NODES)]


@pytest.mark.parametrize("node", [-1, NODES])
def test_an_edge_to_a_missing_node_is_refused(node: int) -> None:
    with pytest.raises(DataError, match="expected 0 … 11"):
        normalised_adjacency(torch.tensor([[0, 3], [1, node]]), NODES, torch.float32)


def neighbourhoods(edge: torch.Tensor, x: torch.Tensor) -> Neighbourhoods:
    return FAMILY.neighbourhoods(FAMILY.prepare((x, edge)))


def test_drawn_neighbours_are_neighbours_and_no_more_than_asked_for() -> None:
    x, edge = torch.arange(NODES * 2.0).view(NODES, 2), edges(30)
    true = dense(edge, NODES) > 0
    rows = torch.tensor([7, 2, 9])
    node, (features, drawn) = neighbourhoods(edge, x).draw(rows, (2, 3), seed=5)
    assert node[:3].tolist() == rows.tolist()
    assert len(set(node.tolist())) == len(node)
    assert torch.equal(features, x[node])
    pairs = node[drawn]
    assert all(true[source, target] for source, target in pairs.T.tolist())
    first = [target for source, target in pairs.T.tolist()[: 3 * 2] if source == 7]
    assert len(set(first)) == len(first) == min(2, int(true[7].sum()))
    # a node is reached by an edge from one that was reached before
    reached = set(rows.tolist())
    for source, target in pairs.T.tolist():
        assert source in reached
        reached.add(target)
    assert reached == set(node.tolist())


def test_all_neighbours_drawn_give_the_whole_graphs_logits() -> None:
    model = disturbed(build("gcn", Task((5,), 3), widths=(6,))).double()
    x, edge = torch.randn(NODES, 5, dtype=torch.float64), edges(14)
    rows = torch.tensor([3, 8])
    # one step more than layers: the neighbours' own numbers of neighbours count too
    node, inputs = neighbourhoods(edge, x).draw(rows, (99,) * 3, seed=0)
    torch.testing.assert_close(model(*inputs)[:2], model(x, edge)[rows], rtol=1e-12, atol=1e-12)
    assert len(node) < NODES


def test_every_neighbour_is_drawn_equally_often() -> None:
    star = torch.stack([torch.zeros(NODES - 1, dtype=torch.int64), torch.arange(1, NODES)])
    around = neighbourhoods(star, torch.zeros(NODES, 1))
    counts = torch.zeros(NODES)
    for seed in range(600):
        node, _ = around.draw(torch.tensor([0]), (4,), seed=seed)
        counts[node] += 1
    # itself is always there; of 12 neighbours, itself included, 4 are drawn
    assert counts[0] == 600
    assert (counts[1:] - 200).abs().max() < 6 * (600 * (1 / 3) * (2 / 3)) ** 0.5


def test_its_inputs_are_neighbourhoods() -> None:
    spaces = FAMILY.inputs(GCNParameters(widths=(4,)), Task((5,), 3))
    assert spaces["layers.0"].names[2] == "mean feature 2"
    assert spaces["layers.1"].names[3] == "mean layers.0 3"


def test_takes_features_of_nodes_only() -> None:
    with pytest.raises(ModelError, match="takes numbers, the data has image"):
        build("gcn", Task((1, 8, 8), 2))


def test_a_graph_with_as_many_edges_as_nodes_is_measured() -> None:
    model = build("gcn", Task((5,), 3), widths=(4,)).eval()
    x, edge = torch.randn(NODES, 5), edges(NODES)
    assert edge.max() > 0
    found = measure(model, [(x, edge)], statistics=[statistics()["response"]])
    assert set(found["neurons"]["n"].to_pylist()) == {NODES}
    assert found["sites"]["interpreted"].to_pylist() == [True, True]
