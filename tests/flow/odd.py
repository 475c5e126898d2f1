"""Models of odd forms: layers that no family has, each followed by a tap and by a script."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Odd(nn.Module):
    """One layer into another by some way; `form` names it."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm, self.dropout = nn.LayerNorm(6), nn.Dropout(0.5)
        self.wide, self.third = nn.Linear(6, 18), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(self, f"_{self.form}")(x)

    def _in_place(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(functional.relu(self.first(x), inplace=True))

    def _residual_in_place(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu_(self.first(x))
        y += x
        return self.second(y)

    def _tied(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(functional.gelu(self.first(functional.relu(self.first(x)))), self.first.weight.t())

    def _chunks(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.wide(self.norm(x)).chunk(3, dim=-1)
        return self.second(functional.scaled_dot_product_attention(query, key, value))

    def _gated(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        return self.second(functional.silu(self.first(x)) * self.wide(x)[..., :6])

    def _beside_a_pair(self, x: torch.Tensor) -> torch.Tensor:
        # the last of three that read y shares the inputs of a pair, which are not had as views
        y = functional.relu(self.wide(x)[..., :6])
        return functional.silu(self.first(y)) * self.second(y) + self.third(y)

    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.dropout(functional.gelu(self.first(self.norm(x)))))

    def _number(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(functional.relu(self.first(x) * torch.tensor(0.5)))

    def _loop(self, x: torch.Tensor) -> torch.Tensor:
        state = torch.zeros_like(x[:, 0])
        for step in range(x.shape[1]):
            state = torch.tanh(self.first(x[:, step]) + self.second(state))
        return state

    def _standardised(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.first.weight / self.first.weight.norm(dim=1, keepdim=True)
        return self.second(functional.relu(functional.linear(x, weight)))


FORMS = [
    "in_place",
    "residual_in_place",
    "tied",
    "chunks",
    "gated",
    "beside_a_pair",
    "dropped",
    "number",
    "loop",
    "standardised",
]
