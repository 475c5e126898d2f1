"""Graph networks against a dense Â: products, sparse products, messages; one graph, batches and lists of graphs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.flow.models import Free, linear, numbers, weight
from tests.flow.shown import batch_of, show

NODES = 8


def edges(count: int = 20, nodes: int = NODES) -> torch.Tensor:
    return torch.randint(nodes, (2, count), generator=torch.Generator().manual_seed(1))


def dense(edge: torch.Tensor, weight_E: torch.Tensor, nodes: int = NODES) -> torch.Tensor:
    adjacency = torch.zeros(nodes, nodes, dtype=torch.float64)
    adjacency.index_put_((edge[1], edge[0]), weight_E, accumulate=True)
    return adjacency


def convolved(self, x, edge, weight_E, form):
    h = self.l(x)
    if form == "dense":
        out = dense(edge, weight_E) @ h
    elif form == "sparse":
        out = torch.sparse.mm(dense(edge, weight_E).to_sparse(), h)
    elif form == "csr":
        out = dense(edge, weight_E).to_sparse_csr() @ h
    elif form == "scatter":
        message = h.index_select(0, edge[0]) * weight_E[:, None]
        out = h.new_zeros(h.shape).scatter_add_(0, edge[1][:, None].expand_as(message), message)
    else:
        message = weight_E.view(-1, 1) * h[edge[0]]
        out = torch.zeros_like(h).index_add(0, edge[1], message)
    return (out + self.b).relu()


@pytest.mark.parametrize("form", ["dense", "sparse", "csr", "scatter", "index_add"])
@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning")
def test_the_aggregated_neighbourhood_is_the_presentation(form):
    x, edge = numbers(NODES, 3), edges()
    weight_E = torch.rand(20, dtype=torch.float64)
    adjacency = dense(edge, weight_E)
    if form in ("dense", "sparse", "csr"):
        given = (
            adjacency if form == "dense" else adjacency.to_sparse() if form == "sparse" else adjacency.to_sparse_csr()
        )
        model = Free(lambda self, x, a: (a @ self.l(x) + self.b).relu(), l=linear(3, 4, bias=False), b=weight(4))
        shown = show(model, batch_of(x, given))
    else:
        model = Free(lambda self, *args: convolved(self, *args, form), l=linear(3, 4, bias=False), b=weight(4))
        shown = show(model, batch_of(x, edge, weight_E))
    site = shown.site("l")
    assert (site.kind, site.gate) == ("graph", "relu")
    torch.testing.assert_close(shown.x["l"][:, 0, 0], adjacency @ x)
    torch.testing.assert_close(shown.z["l"][:, 0], adjacency @ x @ model.l.weight.T + model.b)
    torch.testing.assert_close(site.bias_U, model.b.detach())
    assert shown.last["l"].row_L is None
    assert shown.discovery.unread == ()


def test_a_product_that_comes_first_needs_no_rebuilding():
    x, adjacency = numbers(NODES, 3), torch.rand(NODES, NODES, dtype=torch.float64)
    model = Free(lambda self, x, a: self.l(a @ x).relu(), l=linear(3, 4))
    shown = show(model, batch_of(x, adjacency))
    assert shown.site("l").kind == "graph"
    torch.testing.assert_close(shown.x["l"][:, 0, 0], adjacency @ x)


def test_an_adjacency_that_the_model_keeps():
    adjacency = torch.rand(NODES, NODES, dtype=torch.float64)
    model = Free(lambda self, x: (self.a @ self.l(x)).relu(), l=linear(3, 4, bias=False), a=nn.Buffer(adjacency))
    x = numbers(NODES, 3)
    shown = show(model, batch_of(x))
    assert [site.name for site in shown.discovery.sites] == ["l"]
    torch.testing.assert_close(shown.x["l"][:, 0, 0], adjacency @ x)


def test_a_bias_inside_the_sum_is_no_affine_map_of_it():
    """Â(XW + b) has a bias that differs from node to node: the layer's own output stands."""
    x, adjacency = numbers(NODES, 3), torch.rand(NODES, NODES, dtype=torch.float64)
    model = Free(lambda self, x, a: (a @ self.l(x)).relu(), l=linear(3, 4))
    shown = show(model, batch_of(x, adjacency))
    assert (shown.site("l").kind, shown.site("l").gate) == ("dense", "identity")
    torch.testing.assert_close(shown.z["l"][:, 0], model.l(x))


def test_learned_coefficients_are_no_neighbourhood():
    def forward(self, x):
        scores = self.q(x) @ self.k(x).mT
        return torch.softmax(scores, -1) @ self.v(x)

    model = Free(forward, q=linear(3, 4), k=linear(3, 4), v=linear(3, 4, bias=False))
    shown = show(model, batch_of(numbers(5, 6, 3)))
    assert {site.kind for site in shown.discovery.sites} == {"dense"}
    torch.testing.assert_close(shown.x["v"], shown.x["q"])


def small_graphs() -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor, torch.Tensor, torch.Tensor]:
    sizes = (3, 5, 2)
    graphs = [(numbers(size, 3), edges(2 * size, size)) for size in sizes]
    starts = [0, 3, 8]
    x = torch.cat([x for x, _ in graphs])
    edge = torch.cat([edge + start for (_, edge), start in zip(graphs, starts, strict=True)], 1)
    return graphs, x, edge, torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))


def graph_model() -> Free:
    def forward(self, x, edge, graph):
        h = self.enter(x)[edge[0]]
        messages = torch.zeros(len(x), 4, dtype=x.dtype).index_add(0, edge[1], h).relu()
        pooled = torch.zeros(3, 4, dtype=x.dtype).index_add(0, graph, messages)
        return self.head(pooled)

    return Free(forward, enter=linear(3, 4, bias=False), head=linear(4, 2))


def test_batched_graphs_know_the_graph_of_each_node():
    _, x, edge, graph = small_graphs()
    shown = show(graph_model(), batch_of(x, edge, graph, rows=3))
    assert shown.last["enter"].row_L.tolist() == graph.tolist()
    assert shown.last["enter"].position_LS[:, 0].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1]
    assert shown.last["head"].row_L is None


def test_lists_of_graphs_of_any_size():
    graphs, x, edge, graph = small_graphs()
    inner = graph_model()

    def forward(self, graphs):
        start, parts = 0, []
        for nodes, joined in graphs:
            parts.append((nodes, joined + start, torch.full((len(nodes),), len(parts))))
            start += len(nodes)
        x, edge, graph = (torch.cat([part[i] for part in parts], 1 if i == 1 else 0) for i in range(3))
        return self.inner(x, edge, graph)

    shown = show(Free(forward, inner=inner), batch_of(graphs, rows=3))
    whole = show(inner, batch_of(x, edge, graph, rows=3))
    assert shown.last["inner.enter"].row_L.tolist() == graph.tolist()
    torch.testing.assert_close(shown.z["inner.enter"], whole.z["enter"])


def test_a_network_on_edges_knows_their_graph():
    def forward(self, x, edge, edge_x, graph):
        joint = torch.cat([x[edge[0]], x[edge[1]], edge_x], -1)
        return torch.sigmoid(self.f(joint)) * nn.functional.softplus(self.s(joint))

    _, x, edge, graph = small_graphs()
    model = Free(forward, f=linear(8, 4), s=linear(8, 4))
    shown = show(model, batch_of(x, edge, numbers(edge.shape[1], 2), graph, rows=3))
    assert shown.last["f"].row_L.tolist() == graph[edge[1]].tolist()
    assert [site.gate for site in shown.discovery.sites] == ["sigmoid", "softplus"]


def crystal_model() -> Free:
    """A crystal graph network: neighbours in a table (nodes × M), gated messages, a norm inside the gate."""

    def forward(self, atoms, bonds, neighbours, crystals):
        count, most = neighbours.shape
        h = self.enter(atoms)
        joint = torch.cat([h.unsqueeze(1).expand(count, most, 4), h[neighbours], bonds], 2)
        gated = self.norm(self.full(joint).view(-1, 8)).view(count, most, 8)
        filters, cores = gated.chunk(2, 2)
        h = h + (torch.sigmoid(filters) * nn.functional.softplus(cores)).sum(1)
        if isinstance(crystals, list):
            pooled = torch.cat([h[nodes].mean(0, keepdim=True) for nodes in crystals])
        else:
            sizes = crystals.diff() if len(crystals) > 3 else crystals
            pooled = torch.stack([part.mean(0) for part in h.split(sizes.tolist())])
        return self.head(pooled)

    norm = nn.BatchNorm1d(8, dtype=torch.float64).eval()
    return Free(forward, enter=linear(3, 4), full=linear(10, 8), norm=norm, head=linear(4, 2))


@pytest.mark.parametrize("form", ["lists", "sizes", "bounds"])
def test_crystals_as_nodes_with_tables_of_neighbours(form, randomised):
    sizes, starts = torch.tensor([3, 5, 2]), (0, 3, 8)
    tables = [torch.randint(start, start + size, (size, 2)) for start, size in zip(starts, sizes.tolist(), strict=True)]
    crystals = {
        "lists": [torch.arange(start, start + size) for start, size in zip(starts, sizes.tolist(), strict=True)],
        "sizes": sizes,
        "bounds": torch.tensor([0, *sizes.cumsum(0)]),
    }[form]
    atoms, bonds, table = numbers(10, 3), numbers(10, 2, 2), torch.cat(tables)
    model = randomised(crystal_model())
    shown = show(model, batch_of(atoms, bonds, table, crystals, rows=3))
    assert [(site.name, site.gate) for site in shown.discovery.sites] == [
        ("enter", "identity"),
        ("full.0", "sigmoid"),
        ("full.1", "softplus"),
        ("head", "identity"),
    ]
    of_node = torch.repeat_interleave(torch.arange(3), sizes)
    assert shown.last["enter"].row_L.tolist() == of_node.tolist()
    last = shown.last["full.0"]
    entries = last.row_L[:, None].expand(-1, last.positions).flatten()
    assert entries.tolist() == of_node.repeat_interleave(2).tolist()
    h = model.enter(atoms).detach()
    joint = torch.cat([h.unsqueeze(1).expand(10, 2, 4), h[table], bonds], 2)
    torch.testing.assert_close(shown.x["full.0"].reshape(10, 2, 10), joint)
    assert shown.last["head"].row_L is None


@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_inputs_are_read_as_the_numbers_they_hold(layout):
    x = numbers(6, 9) * (torch.rand(6, 9) > 0.7)
    model = Free(lambda self, x: (torch.sparse.mm(x, self.w) + self.b).relu(), w=weight(9, 4), b=weight(4))
    shown = show(model, batch_of(x.to_sparse(layout=layout)))
    torch.testing.assert_close(shown.x["w"][:, 0, 0], x)
    torch.testing.assert_close(shown.z["w"][:, 0], x @ model.w + model.b)
    assert shown.site("w").gate == "relu"


def test_features_written_into_memory_of_one_graph_are_that_graph_s():
    """Each graph's angles are expanded into a table made for it, part by part; then all are joined."""

    def forward(self, graphs):
        parts = []
        for angle in graphs:
            table = angle.new_zeros(len(angle), 5)
            table[:, 0] = 1.0
            table[:, 1:3] = torch.sin(torch.outer(angle, self.f))
            table[:, 3:] = torch.cos(torch.outer(angle, self.f))
            parts.append(table)
        return self.l(torch.cat(parts)).relu()

    model = Free(forward, f=weight(2), l=linear(5, 4))
    shown = show(model, batch_of([numbers(4), numbers(2), numbers(7)], rows=3))
    assert shown.last["l"].row_L.tolist() == [0] * 4 + [1] * 2 + [2] * 7
    model = Free(lambda self, x: self.l(self.fill(x)), l=linear(5, 4))

    def fill(x):
        table = x.new_zeros(len(x), 5)
        table[:, 1:] = x
        return table

    model.fill = fill
    assert show(model, batch_of(numbers(6, 4))).last["l"].row_L is None


def test_rows_written_one_by_one_are_all_of_them():
    def forward(self, x):
        table = x.new_zeros(len(x), 4)
        for number, row in enumerate(x):
            table[number] = self.a(row)
        return self.l(table)

    shown = show(Free(forward, a=linear(3, 4), l=linear(4, 2)), batch_of(numbers(3, 3)))
    assert shown.last["l"].row_L is None
