"""A tokenizer with one token for each byte, so that a test can read token ids as text and back."""

from __future__ import annotations

import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from adapters.tokenizer import Tokenizer

BOS_TOKEN_ID = 256
EOS_TOKEN_ID = 257


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are the bytes, 256 is `<s>` and 257 `</s>`; it adds no special tokens by itself."""

    def __init__(self) -> None:
        vocab = {character: byte for byte, character in bytes_to_unicode().items()}
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(["<s>", "</s>"])
        super().__init__(backend, bos_token_id=BOS_TOKEN_ID, eos_token_id=EOS_TOKEN_ID, pad_token_id=None)
