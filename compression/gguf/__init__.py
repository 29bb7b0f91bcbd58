"""The tensor types of GGUF files, as numbers or as they are; their byte layouts are in docs/formats/gguf.md."""

from compression.gguf.dequantize import dequantize
from compression.gguf.grouped import GROUPED_TYPES, read_grouped

__all__ = ["GROUPED_TYPES", "dequantize", "read_grouped"]
