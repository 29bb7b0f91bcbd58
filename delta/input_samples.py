"""What the linear layers of a model get as inputs: what an error in their weights does depends on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

InputSamples: TypeAlias = Mapping[str, Sequence[Tensor]]
"""By the name of the weight [N, K]: inputs [num_tokens, K] bfloat16 in pieces, which layers of the same input share."""

_MAX_TOKENS = 1024


@torch.inference_mode()
def sample_inputs(model: nn.Module, sequences: Sequence[Sequence[int]]) -> InputSamples:
    """The inputs of every `nn.Linear` at tokens of these sequences, evenly spread over them, 1,024 at most."""
    stride = max(1, -(-sum(map(len, sequences)) // _MAX_TOKENS))
    samples: dict[str, list[Tensor]] = {}
    last: list[Tensor] = []  # the last input and what was kept of it

    def keep(name: str, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        (given,) = arguments
        if not last or last[0] is not given:
            last[:] = [given, given.flatten(0, -2)[::stride].bfloat16()]
        samples.setdefault(name, []).append(last[1])

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                hooks.callback(module.register_forward_pre_hook(partial(keep, f"{name}.weight")).remove)
        for token_ids in sequences:
            model(torch.tensor([token_ids]), use_cache=False)
    return samples
