"""The tensor types of GGUF files: how many bytes they take and which numbers those bytes are.

The byte layouts are in docs/formats/gguf.md.
"""

from compression.gguf.block_types import BLOCK_TYPES, BlockType, find_block_type
from compression.gguf.dequantize import dequantize

__all__ = ["BLOCK_TYPES", "BlockType", "dequantize", "find_block_type"]
