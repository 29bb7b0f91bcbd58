"""What is tuned of paged attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product

import torch
from torch import Tensor

from model_worker.engine.ops.paged_attention.metadata import AttentionMetadata, AttentionParams
from model_worker.engine.ops.paged_attention.reference import paged_attention_reference
from model_worker.engine.ops.paged_attention.triton_tiles import OP, TUNED, TileShape, shape_class, with_choice
from model_worker.engine.ops.tuning.search import Choice, Problem

_BLOCK_SIZE = 16
_TOLERANCE = 2e-2  # of the norm of the difference


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """Attention of one step, with tiles of several shapes.

    Attributes:
        shapes: of tiles with few and with many rows; that at `place` is the one that is tuned.
        batches: the same metadata for each choice, with the plan that was made for it.
    """

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    metadata: AttentionMetadata
    params: AttentionParams
    shapes: tuple[TileShape, TileShape]
    place: int
    batches: dict[tuple[int, ...], AttentionMetadata] = field(default_factory=dict)

    def run(self, choice: Choice) -> Tensor:
        # Imported here: kernels may be defined only where a GPU, or the interpreter, will run them.
        from model_worker.engine.ops.paged_attention.triton import paged_attention

        batch = self.batches.setdefault(tuple(choice.values()), replace(self.metadata, plans={}))
        few, many = self.shapes
        shapes = (with_choice(few, choice), many) if self.place == 0 else (few, with_choice(many, choice))
        return paged_attention(self.query, self.key_cache, self.value_cache, batch, self.params, shapes)

    def check(self, choice: Choice) -> None:
        expected = paged_attention_reference(
            self.query, self.key_cache, self.value_cache, self.metadata, self.params
        ).float()
        error = (self.run(choice).float() - expected).norm() / expected.norm()
        assert error < _TOLERANCE, f"{choice} is wrong by {error:.3g}"


def attention_problems(
    device: torch.device, *, heads: tuple[int, int], head_dim: int, decode: tuple[int, int], prompt: int
) -> Iterator[Problem]:
    """Of a model with so many heads of queries and of keys; in bfloat16.

    Args:
        decode: sequences and tokens of each.
        prompt: tokens of the one that is computed at once.
    """
    from model_worker.engine.ops.paged_attention.triton import suitable_shapes

    for place, (num_sequences, context, query_len) in enumerate(((*decode, 1), (1, prompt, prompt))):
        metadata = _metadata(num_sequences, context, query_len, device)
        query = torch.randn(num_sequences * query_len, heads[0], head_dim, device=device).bfloat16()
        lead = (metadata.block_tables.numel(), _BLOCK_SIZE, heads[1], head_dim)
        key_cache, value_cache = (torch.randn(lead, device=device).bfloat16() for _ in range(2))
        shapes = suitable_shapes(query, key_cache, value_cache)
        params = AttentionParams(scale=head_dim**-0.5)
        step = _Step(query, key_cache, value_cache, metadata, params, shapes, place)
        name = shape_class(shapes[place], heads[0] // heads[1], head_dim, torch.bfloat16)
        yield Problem(OP, name, candidate_shapes(shapes[place]), step.run, step.check)


def candidate_shapes(shape: TileShape) -> tuple[Choice, ...]:
    """The default first."""
    default = {name: getattr(shape, name) for name in TUNED}
    programs = (2, 4, 6, 12) if shape.whole else (shape.programs_per_multiprocessor,)
    warps = (2, 4) if shape.whole else (4, 8)
    others = (dict(zip(TUNED, choice, strict=True)) for choice in product((32, 64, 128), warps, (2, 3, 4, 5), programs))
    return (default, *(choice for choice in others if choice != default))


def _metadata(num_sequences: int, context: int, query_len: int, device: torch.device) -> AttentionMetadata:
    """Sequences of `context` tokens, of which the last `query_len` are computed, in blocks of random order."""
    num_blocks = -(-context // _BLOCK_SIZE)
    tables = torch.randperm(num_sequences * num_blocks, device=device).int().view(num_sequences, num_blocks)
    return AttentionMetadata(
        block_tables=tables,
        query_start=tuple(range(0, num_sequences * query_len + 1, query_len)),
        seq_lens=(context,) * num_sequences,
        positions=torch.arange(context - query_len, context, device=device).repeat(num_sequences),
    )
