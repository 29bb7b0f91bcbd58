"""What the dry run notes of a layer's attention."""

from __future__ import annotations

import torch
from torch import nn

from model_worker.engine.layers.attention import ForwardContext
from model_worker.engine.models.attention_interface import EXTRAS, AttentionExtras, AttentionProbe
from model_worker.engine.ops.paged_attention import Alibi


def test_slopes_come_to_where_the_model_computes() -> None:
    module = nn.Module()
    setattr(module, EXTRAS, AttentionExtras(alibi=Alibi(torch.ones(4), 0.5)))  # made on the CPU, before the weights
    probe = AttentionProbe(ForwardContext())
    query = torch.empty(2, 4, 8, device="meta")
    probe.record(module, query, query, query, {})
    ((_, attention),) = probe.calls
    assert attention.params.alibi is not None
    assert attention.params.alibi.slopes.device == query.device
    assert attention.params.alibi.multiplier == 0.5
