from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from pipeline.errors import ModelError
from pipeline.models.base import Task
from tests.models.build import build, disturbed, on_meta, parameters

CIFAR = Task((3, 32, 32), 10)


# the paper's table 6 in full: .27, .46, .66, .85 and 1.7 million
@pytest.mark.parametrize(
    ("depth", "expected"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018), (110, 1_727_962)]
)
def test_the_papers_depths_have_the_papers_sizes(depth: int, expected: int) -> None:
    assert parameters(on_meta("resnet", CIFAR, depth=depth)) == expected


def test_resnet_18_for_small_images() -> None:
    model = on_meta("resnet", CIFAR, depth=18, widths=(64, 128, 256, 512), shortcut="B")
    assert parameters(model) == 11_173_962


def test_a_projection_adds_its_weights_alone() -> None:
    plain, projected = (on_meta("resnet", CIFAR, shortcut=kind) for kind in "AB")
    assert parameters(projected) - parameters(plain) == (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_forward_is_the_papers(shortcut: str) -> None:
    model = disturbed(build("resnet", Task((3, 12, 12), 5), depth=14, widths=(4, 6, 9), shortcut=shortcut)).double()
    x = torch.randn(3, 3, 12, 12, dtype=torch.float64)
    torch.testing.assert_close(
        model(x), reference(model.state_dict(), x, blocks=2, widths=(4, 6, 9)), rtol=1e-12, atol=0
    )


def reference(
    weights: dict[str, torch.Tensor], x: torch.Tensor, *, blocks: int, widths: tuple[int, ...]
) -> torch.Tensor:
    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        mean, var, gain, shift = (
            weights[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * gain + shift

    x = norm("stem_norm", functional.conv2d(x, weights["stem.weight"], padding=1)).clamp(min=0)
    for stage, width in enumerate(widths):
        for number in range(stage * blocks, (stage + 1) * blocks):
            name, stride = f"blocks.{number}", 2 if stage and number % blocks == 0 else 1
            made = norm(
                f"{name}.norm1", functional.conv2d(x, weights[f"{name}.conv1.weight"], padding=1, stride=stride)
            )
            made = norm(
                f"{name}.norm2", functional.conv2d(made.clamp(min=0), weights[f"{name}.conv2.weight"], padding=1)
            )
            if f"{name}.shortcut.0.weight" in weights:
                x = norm(
                    f"{name}.shortcut.1", functional.conv2d(x, weights[f"{name}.shortcut.0.weight"], stride=stride)
                )
            else:
                x = x[:, :, ::stride, ::stride]
                x = torch.cat([x, x.new_zeros(len(x), width - x.shape[1], *x.shape[2:])], 1)
            x = (made + x).clamp(min=0)
    return x.mean((2, 3)) @ weights["classifier.weight"].T + weights["classifier.bias"]


def test_initial_weights_have_hes_variance() -> None:
    weight = build("resnet", CIFAR, widths=(64, 64, 64)).get_parameter("blocks.3.conv2.weight")
    assert abs(weight.std().item() / (2 / (9 * 64)) ** 0.5 - 1) < 0.02


@pytest.mark.parametrize("depth", [18, 21])
def test_a_depth_that_fits_no_stages_is_refused(depth: int) -> None:
    with pytest.raises(ModelError, match="expected 20 or 26" if depth == 21 else "expected 14 or 20"):
        build("resnet", CIFAR, depth=depth)


def test_takes_images_only() -> None:
    with pytest.raises(ModelError, match="takes image, the data has series"):
        build("resnet", Task((3, 32), 2))
