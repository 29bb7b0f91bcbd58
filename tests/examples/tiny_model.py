"""A Llama of two layers that learns in a second."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_model(vocab_size: int = 64) -> LlamaForCausalLM:
    """With the same weights each time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config)
