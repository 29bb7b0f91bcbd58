"""The tensor types of GGUF files as numbers; their byte layouts are in docs/formats/gguf.md."""

from compression.gguf.dequantize import dequantize

__all__ = ["dequantize"]
