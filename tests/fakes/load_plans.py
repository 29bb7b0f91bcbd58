"""Load plans of models that do not exist, for code that only reads them."""

from __future__ import annotations

from pathlib import Path

from adapters.chat_template import ChatTemplate
from adapters.load_plan import LoadPlan, MemoryEstimate
from registry.checkpoint import Checkpoint
from registry.families import ModelFamily

VOCAB_SIZE = 260  # of a ByteTokenizer, and a few rows more
LINES_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_plan(*, chat: bool = True, stop: tuple[str, ...] = (), max_model_len: int = 256) -> LoadPlan:
    """A plan of the family `fake`; its chat template writes `role: content` lines."""
    path = Path("fake-model")
    return LoadPlan(
        path=path,
        family=ModelFamily("fake", ("fake",), ("FakeForCausalLM",), ("completion",), max_model_len, None, "", "", None),
        checkpoint=Checkpoint(path, "safetensors", (), {}, {}),
        config={"model_type": "fake"},
        dtype="float32",
        quantization=None,
        deltas=(),
        tokenizer_path=path,
        chat_template=ChatTemplate("lines", LINES_TEMPLATE, stop=stop) if chat else None,
        stop_token_ids=(257,),
        max_model_len=max_model_len,
        memory=MemoryEstimate(weights_bytes=0, kv_bytes_per_token=0, activations_bytes=0),
        vocab_size=VOCAB_SIZE,
    )
