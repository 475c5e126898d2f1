"""How often and in what form a model is called: twice, in loops, by level, by image; tuples, dicts, programs."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from torch import fx, nn
from torch.nn import functional

from pipeline.batch import Batch
from pipeline.flow.discover import discover
from pipeline.flow.tap import tapped_forward
from tests.flow.models import Free, linear, numbers
from tests.flow.shown import batch_of, show


def shapes_seen(model, found, batch) -> dict[str, list[tuple[int, ...]]]:
    seen: dict[str, list[tuple[int, ...]]] = {}
    tapped_forward(model, found, batch, lambda p: seen.setdefault(p.site.name, []).append(tuple(p.z_LSU.shape)))
    return seen


def test_a_module_called_twice_is_two_sites():
    layer = linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.Tanh())
    x = numbers(5, 4)
    shown = show(model, batch_of(x))
    assert [(site.name, site.call, site.gate) for site in shown.discovery.sites] == [
        ("0", 0, "relu"),
        ("0#1", 1, "tanh"),
    ]
    torch.testing.assert_close(shown.x["0#1"], shown.a["0"][:, :, None])


def test_many_calls_are_one_site_with_every_step_a_position():
    def forward(self, x):
        for _ in range(self.steps):
            x = self.l(x).relu_()
        return x

    model = Free(forward, l=linear(4, 4), steps=10)
    x = numbers(5, 4)
    found = discover(model, batch_of(x))
    assert [site.name for site in found.sites] == ["l"]
    assert found.sites[0].note == "its 10 calls in the probe's forward are one site"
    for steps in (10, 13, 1):
        model.steps = steps
        assert shapes_seen(model, found, batch_of(x)) == {"l": [(5 * steps, 1, 4)]}
    model.steps = 10
    shown = show(model, batch_of(x))
    last = shown.last["l"]
    order = (last.row_L * 10 + last.position_LS[:, 0]).argsort()
    expected = [x]
    for _ in range(10):
        expected.append(model.l(expected[-1]).relu())
    torch.testing.assert_close(shown.a["l"][order][:, 0].view(5, 10, 4), torch.stack(expected[1:], 1))


def test_the_labels_of_positions_go_with_every_call():
    def forward(self, x):
        for _ in range(10):
            x = self.l(x).relu()
        return x

    label_NS = torch.arange(15).view(5, 3) - 1
    batch = Batch(inputs=(numbers(5, 3, 4),), uid_N=torch.arange(5), label_NS=label_NS)
    shown = show(Free(forward, l=linear(4, 4)), batch).last["l"]
    assert shown.label_LS is not None
    assert shown.label_LS.shape == shown.z_LSU.shape[:2]
    kept = shown.select_rows(torch.tensor([False, True, False, True, False]))
    for row in range(5):
        ours = shown.label_LS[shown.row_index_L == row].flatten().sort().values
        assert ours.tolist() == label_NS[row].repeat_interleave(10).tolist()
    assert kept.label_LS is not None
    assert len(kept.label_LS) == 2 * 30


def test_many_calls_are_several_sites_where_their_gates_differ():
    def forward(self, x):
        for _ in range(9):
            x = self.l(x).relu()
        return self.l(x)

    found = discover(Free(forward, l=linear(4, 4)), batch_of(numbers(5, 4)))
    assert [site.gate for site in found.sites] == [*["relu"] * 9, "identity"]


def test_a_few_calls_that_become_more_drop_nothing():
    def forward(self, x):
        for _ in range(self.steps):
            x = self.l(x).relu()
        return x

    model = Free(forward, l=linear(4, 4), steps=3)
    found = discover(model, batch_of(numbers(5, 4)))
    assert [site.name for site in found.sites] == ["l", "l#1", "l#2"]
    for steps, calls in ((5, [1, 1, 3]), (3, [1, 1, 1]), (1, [1])):
        model.steps = steps
        seen = shapes_seen(model, found, batch_of(numbers(5, 4)))
        assert [len(shapes) for shapes in seen.values()] == calls


def test_images_of_any_size_one_by_one():
    model = Free(
        lambda self, images: torch.stack([self.c(image[None]).relu().mean((0, 2, 3)) for image in images]),
        c=nn.Conv2d(3, 4, 3),
    )
    probe = batch_of([torch.randn(3, 8, 9), torch.randn(3, 5, 5)], rows=2)
    found = discover(model, probe)
    assert [site.name for site in found.sites] == ["c"]
    images = [torch.randn(3, height, 6) for height in (6, 9, 7, 4)]
    seen = Counter()

    def observe(presentations):
        (row,) = presentations.row_L.tolist()
        seen[row] += 1
        image = images[row]
        torch.testing.assert_close(presentations.z_LSU[0].T.unflatten(1, (image.shape[1] - 2, 4)), model.c(image))

    tapped_forward(model, found, batch_of(images, rows=4), observe)
    assert seen == {0: 1, 1: 1, 2: 1, 3: 1}


def test_a_cascade_crops_what_it_found():
    """A detector: the second stage sees crops of the first's hits, as many as there are, each of a known image."""

    def forward(self, images):
        heat = self.first(images).relu().amax(1)
        hits = (heat > heat.flatten(1).median(1).values[:, None, None]).nonzero()[:7]
        crops = torch.stack([images[int(n), :, int(y) : int(y) + 3, int(x) : int(x) + 3] for n, y, x in hits])
        return self.second(crops.flatten(1))

    model = Free(forward, first=nn.Conv2d(2, 3, 3), second=nn.Linear(18, 2))
    found = discover(model, batch_of(torch.randn(3, 2, 8, 8)))
    images = torch.randn(4, 2, 7, 9)
    shown = {}
    tapped_forward(model, found, batch_of(images), lambda p: shown.update({p.site.name: p}))
    crops = shown["second"].patches(0, 7)[:, 0, 0].view(7, 2, 3, 3)
    for crop, row in zip(crops, shown["second"].row_L.tolist(), strict=True):
        windows = images[row].unfold(1, 3, 1).unfold(2, 3, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
        assert any(torch.equal(crop, window) for window in windows)


@dataclass
class Output:
    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...]


@pytest.mark.parametrize("form", ["tuple", "dict", "dataclass", "own call", "keyword"])
def test_inputs_and_outputs_as_people_have_them(form):
    def forward(self, x, y=None):
        if form == "dict":
            x, y = x["x"], x["y"]
        elif form == "tuple":
            x, y = x
        h = self.a(x).relu()
        out = self.b(torch.cat([h, y], 1))
        return {"dict": {"out": out}, "dataclass": Output(out, (h,)), "tuple": (out, [h])}.get(form, out)

    model = Free(forward, a=linear(3, 4), b=linear(6, 2))
    x, y = numbers(5, 3), numbers(5, 2)
    batch = {
        "dict": batch_of({"x": x, "y": y}, rows=5),
        "tuple": batch_of((x, y), rows=5),
        "keyword": batch_of(x, kwargs={"y": y}),
        "own call": batch_of(x, y, call=lambda model, batch: model.forward(batch.inputs[0], batch.inputs[1])),
    }.get(form, batch_of(x, y))
    shown = show(model, batch)
    assert [site.gate for site in shown.discovery.sites] == ["relu", "identity"]
    torch.testing.assert_close(shown.x["b"][:, 0, 0, 4:], y)
    expected = batch.forward(model)
    out = shown.out.logits if form == "dataclass" else shown.out
    if isinstance(out, torch.Tensor):
        torch.testing.assert_close(out, expected.logits if form == "dataclass" else expected)


def test_tensors_that_no_module_has_registered():
    class Loose(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = {"first": torch.randn(5, 3), "more": [torch.randn(5)]}
            self.layers = [nn.Linear(5, 4), nn.BatchNorm1d(4)]

        def forward(self, x):
            h = functional.linear(x, self.weights["first"], self.weights["more"][0]).relu()
            return self.layers[0](h).tanh()

    model, x = Loose(), torch.randn(6, 3)
    shown = show(model, batch_of(x))
    assert [(site.name, site.gate) for site in shown.discovery.sites] == [
        ("weights.first", "relu"),
        ("layers.0", "tanh"),
    ]
    torch.testing.assert_close(shown.a["layers.0"][:, 0], shown.out)


def small_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 6), nn.GELU()
    )


@pytest.mark.parametrize("kind", ["export", "decomposed", "graph module", "compiled", "deep copy"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_programs_are_read_like_the_modules_they_were(kind, randomised):
    model, x = randomised(small_network()).eval(), torch.randn(3, 2, 6, 6)
    whole = show(model, batch_of(x))
    if kind == "export":
        program = torch.export.export(model, (x,)).module()
    elif kind == "decomposed":
        program = torch.export.export(model, (x,)).run_decompositions().module()
    elif kind == "graph module":
        program = fx.symbolic_trace(model)
    elif kind == "compiled":
        program = torch.compile(model)
    else:
        program = nn.ModuleList([model])[0]
    shown = show(program, batch_of(x))
    prefix = "_orig_mod." if kind == "compiled" else ""
    for site in whole.discovery.sites:
        other = shown.site(prefix + site.name)
        assert (other.gate, other.kind) == (site.gate, site.kind)
        torch.testing.assert_close(other.pattern_UD, site.pattern_UD)
        torch.testing.assert_close(shown.a[other.name], whole.a[site.name])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_decomposed_transformer_layer_has_its_norms_folded_and_its_projections_whole(randomised):
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=True)
    model, x = randomised(layer).eval(), torch.randn(3, 5, 8)
    whole = show(model, batch_of(x))
    shown = show(torch.export.export(model, (x,)).run_decompositions().module(), batch_of(x))
    assert [site.name for site in shown.discovery.sites] == [site.name for site in whole.discovery.sites]
    for site, other in zip(whole.discovery.sites, shown.discovery.sites, strict=True):
        assert (other.gate, other.folded, other.groups) == (site.gate, site.folded, 1)
        torch.testing.assert_close(other.pattern_UD, site.pattern_UD)
    assert shown.discovery.unread == ()


def test_functional_code_with_parameters_held_anywhere():
    kernel, bias = nn.Parameter(torch.randn(4, 2, 3)), nn.Parameter(torch.randn(4))

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.held = nn.ParameterDict({"kernel": kernel, "shift": bias})
            self.out = nn.ParameterList([nn.Parameter(torch.randn(4, 3))])

        def forward(self, x):
            h = functional.conv1d(functional.pad(x, (2, 0)), self.held["kernel"]) + self.held["shift"][:, None]
            return functional.leaky_relu(h).mean(-1) @ self.out[0]

    x = torch.randn(3, 2, 7)
    shown = show(Odd(), batch_of(x))
    assert [(site.name, site.kind, site.gate) for site in shown.discovery.sites] == [
        ("held.kernel", "conv1d", "leaky_relu"),
        ("out.0", "dense", "identity"),
    ]
    # the padding was done before: the patches have it
    torch.testing.assert_close(shown.x["held.kernel"][:, 0, 0], functional.pad(x, (2, 0))[:, :, :3].flatten(1))


@pytest.mark.parametrize(
    ("include", "exclude", "names"),
    [
        ((), (), ["0", "4"]),
        (("conv*",), (), ["0"]),
        (("gelu", "relu"), ("4",), ["0"]),
        ((), ("dense",), ["0"]),
        (("nothing",), (), []),
    ],
)
def test_selection_by_name_kind_and_gate(include, exclude, names):
    shown = show(small_network(), batch_of(torch.randn(3, 2, 6, 6)), include=include, exclude=exclude)
    assert [site.name for site in shown.discovery.sites] == names
    assert list(shown.z) == names
    assert [site.index for site in shown.discovery.sites] == list(range(len(names)))
    assert shown.discovery.unread == ()


def test_nothing_of_a_batch_is_kept():
    model, x = small_network(), torch.randn(3, 2, 6, 6)
    found = discover(model, batch_of(x))
    import gc
    import weakref

    kept = []
    tapped_forward(model, found, batch_of(x), lambda p: kept.append(weakref.ref(p.z_LSU)))
    gc.collect()
    assert [ref() for ref in kept] == [None, None]


def test_the_model_is_left_in_its_mode():
    model = small_network().train()
    model[3].eval()
    found = discover(model, batch_of(torch.randn(3, 2, 6, 6)))
    assert not model.training
    model.train()
    model[3].eval()
    tapped_forward(model, found, batch_of(torch.randn(3, 2, 6, 6)), lambda p: None)
    assert [module.training for module in model] == [True, True, True, False, True, True]


def test_one_row_and_no_rows():
    model = small_network()
    found = discover(model, batch_of(torch.randn(3, 2, 6, 6)))
    assert shapes_seen(model, found, batch_of(torch.randn(1, 2, 6, 6))) == {"0": [(1, 16, 4)], "4": [(1, 1, 6)]}
    assert shapes_seen(model, found, batch_of(torch.randn(0, 2, 6, 6))) == {"0": [(0, 16, 4)], "4": [(0, 1, 6)]}
    alone = discover(model, batch_of(torch.randn(1, 2, 6, 6)))
    assert [site.name for site in alone.sites] == ["0", "4"]


def test_batches_of_other_sizes(randomised):
    model = randomised(nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())).eval()
    found = discover(model, batch_of(torch.randn(3, 1, 6, 6)))
    for size in ((5, 1, 9, 4), (2, 1, 3, 12)):
        assert shapes_seen(model, found, Batch((torch.randn(size),), torch.arange(size[0]))) == {
            "0": [(size[0], size[2] * size[3], 3)]
        }


def test_a_tensor_that_is_dropped_on_the_way_gives_its_identity_to_no_other():
    """A cache that eval() clears: what is known of its tensor must not be taken for knowledge of the next one."""

    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.cache, self.alive = linear(3, 4), {}, []

        def train(self, mode=True):
            self.cache = {}
            return super().train(mode)

        def forward(self, x):
            if not self.cache:
                self.alive.append(self.known is not None and self.known() is not None)
                self.cache["shift"] = torch.ones(4, dtype=x.dtype)
                self.known = weakref.ref(self.cache["shift"])
            return (self.layer(x) + self.cache["shift"]).relu()

    model, x = Caching(), numbers(5, 3)
    model.known = None
    found = discover(model, batch_of(x))
    for _ in range(2):
        # one that is in eval mode is not put in it again
        model.training = True
        tapped_forward(model, found, batch_of(x), lambda presentations: None)
    assert model.alive[-1]


def test_views_as_another_tensor_keep_units_and_rows():
    model = Free(lambda self, x: self.n(self.l(x).flatten(0, 1)).reshape_as(x).relu(), l=linear(4, 4))
    model.n = nn.BatchNorm1d(4, dtype=torch.float64)
    x = numbers(3, 5, 4)
    shown = show(model, batch_of(x))
    assert (shown.site("l").gate, shown.site("l").folded) == ("relu", ("n",))
    torch.testing.assert_close(shown.a["l"], model.eval()(x))


@pytest.mark.parametrize("form", ["made", "empty", "a part"])
def test_a_product_is_followed_to_where_it_is_put(form):
    def forward(self, x):
        z = x.new_empty(0 if form == "empty" else (len(x), 4))
        if form == "a part":
            torch.mm(x[:, :3], self.weight, out=z[:])
        else:
            torch.mm(x, self.weight, out=z)
        return z.relu()

    model, x = Free(forward, weight=nn.Parameter(numbers(3, 4))), numbers(5, 3)
    shown = show(model, batch_of(x))
    assert [site.name for site in shown.discovery.sites] == ["weight"]
    torch.testing.assert_close(shown.z["weight"][:, 0], (x @ model.weight).detach())
    torch.testing.assert_close(shown.out, (x @ model.weight).relu().detach())
    if form != "a part":
        assert shown.discovery.sites[0].gate == "relu"
