"""Which layers share a block table, and which share memory.

Layers that see the same earlier positions form a kind. A kind whose layers see all of them needs all blocks of a
sequence; one with a window or with chunks needs only the last ones (see BlockManager). So that blocks of both come from
one pool, layers are put into groups of equal size, and a block is as large as one group needs:

    slot            0        1        2              a group   has a block table of its own
    group 0         layer 0  layer 2  layer 4        a slot    is one pair of tensors, used by one layer of each group
    group 1         layer 1  layer 3  layer 5        a block   is the same place in all slots

A block belongs to one group at a time, so layers that share a slot never meet in a block. When a kind's layers do not
fill its last group, that group leaves slots of its blocks unused. Source of the idea: Jenga, arXiv 2503.18292.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from model_worker.engine.layers.attention import AttentionLayer
from model_worker.engine.visibility import Visibility

_MAX_GROUPS = 8  # a block table for each has to be made in every step


@dataclass(frozen=True, slots=True)
class LayerGroups:
    """The groups of a model.

    Attributes:
        visibility: what the layers of each group see.
        members: for each group the indices of its layers; at most one for each slot, in the order of the slots.
        slots: for each slot a layer that uses it; the others that do keep the same of a token.
    """

    visibility: tuple[Visibility, ...]
    members: tuple[tuple[int, ...], ...]
    slots: tuple[int, ...]

    @property
    def num_groups(self) -> int:
        return len(self.members)

    def max_blocks(self, num_tokens: int, *, block_size: int, max_step_tokens: int) -> int:
        """The most blocks that a sequence of `num_tokens` holds at once, in all groups together."""
        return sum(
            visibility.max_blocks(num_tokens, block_size=block_size, max_step_tokens=max_step_tokens)
            for visibility in self.visibility
        )


def group_layers(attentions: Sequence[AttentionLayer], *, max_model_len: int, mixed: bool = True) -> LayerGroups:
    """The groups that leave the fewest slots unused, and of those the fewest groups.

    Layers with a window that no request reaches see everything. Where kinds are mixed and the layers keep different
    amounts of a token, no slot fits them all: then there is one group, as if all layers saw everything.

    Args:
        attentions: of all layers, in order.
        max_model_len: most positions of a request.
        mixed: False for a model that knows only one block table: it gets one group too, where kinds are mixed.
    """
    kinds: dict[Visibility, list[int]] = {}
    for index, attention in enumerate(attentions):
        kinds.setdefault(attention.params.visibility.within(max_model_len), []).append(index)
    shapes = [attention.kv_shape for attention in attentions]
    if len(kinds) > 1 and not (mixed and len(set(shapes)) == 1):
        kinds = {Visibility(): list(range(len(attentions)))}
    if len(kinds) == 1:
        ((visibility, layers),) = kinds.items()
        return LayerGroups((visibility,), (tuple(layers),), tuple(layers))
    size = min(range(1, max(map(len, kinds.values())) + 1), key=lambda size: _cost(kinds, size))
    groups = [
        (visibility, tuple(layers[start : start + size]))
        for visibility, layers in kinds.items()
        for start in range(0, len(layers), size)
    ]
    return LayerGroups(
        tuple(visibility for visibility, _ in groups),
        tuple(layers for _, layers in groups),
        max((layers for _, layers in groups), key=len),
    )


def _cost(kinds: dict[Visibility, list[int]], size: int) -> tuple[bool, int, int]:
    num_groups = sum(-(-len(layers) // size) for layers in kinds.values())
    return num_groups > max(_MAX_GROUPS, len(kinds)), num_groups * size, num_groups
