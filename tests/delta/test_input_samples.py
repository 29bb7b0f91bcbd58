from __future__ import annotations

import torch
from torch import Tensor, nn

from delta.input_samples import sample_inputs


class _Model(nn.Module):
    """Two layers of one input, and one of another."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 4)
        self.left, self.right, self.last = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, token_ids: Tensor, *, use_cache: bool) -> Tensor:
        assert not use_cache
        hidden = self.embed(token_ids)
        out: Tensor = self.last(self.left(hidden) * self.right(hidden))
        return out


def test_the_inputs_of_every_linear_layer() -> None:
    model = _Model()
    samples = sample_inputs(model, [[1, 2, 3], [4]])
    assert samples.keys() == {"left.weight", "right.weight", "last.weight"}
    expected = model.embed.weight[torch.tensor([1, 2, 3, 4])].bfloat16()
    assert torch.equal(torch.cat(list(samples["left.weight"])), expected)
    assert all(mine is other for mine, other in zip(samples["left.weight"], samples["right.weight"], strict=True))
    assert [tuple(piece.shape) for piece in samples["last.weight"]] == [(3, 6), (1, 6)]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_of_long_texts_only_so_many() -> None:
    samples = sample_inputs(_Model(), [[7] * 3000, [8] * 1000])
    assert sum(map(len, samples["last.weight"])) == 1000


def test_no_texts_no_samples() -> None:
    assert sample_inputs(_Model(), []) == {}
