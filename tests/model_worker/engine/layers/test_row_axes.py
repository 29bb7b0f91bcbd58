"""Which modules compute each token by itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model_worker.engine.layers.row_axes import RowAxes, RowAxisProbe


class _Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class _Router(_Norm):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.weight, x.argmax(dim=-1)


class _Gated(_Norm):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return x * gate * self.weight


class _Model(nn.Module):
    """Tokens [1, T] of 2 heads."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.norm = _Norm()
        self.router = _Router()
        self.gated = _Gated()
        self.expert = nn.Linear(4, 4)
        self.pooled = nn.Linear(8, 8)
        self.twice = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> None:
        heads = self.linear(x).view(1, -1, 2, 4).transpose(1, 2)  # [1, 2, T, 4]
        y = self.norm(heads)
        self.router(y[0, 0])
        self.gated(y, y)
        self.expert(y[0, 0, :2])
        self.pooled(x.mean(dim=1))
        self.twice(x)
        self.twice(x.flatten(0, 1))


def test_the_axis_is_the_one_that_grows_with_the_batch() -> None:
    """Though there are as many heads as tokens."""
    model, probe = _Model(), RowAxisProbe()
    for num_tokens in (2, 3):
        with probe.watching(model, num_tokens):
            model(torch.randn(1, num_tokens, 8))
    assert probe.axes() == {
        model.linear: RowAxes(1, (1,), True, torch.float32),
        model.norm: RowAxes(2, (2,), False, torch.float32),
        model.router: RowAxes(0, (0, 0), True, torch.float32),
    }
    assert not any(module._forward_hooks for module in model.modules())
