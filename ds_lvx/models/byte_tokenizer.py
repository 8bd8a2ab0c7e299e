"""A tokenizer that writes any language and needs no file, for models with random weights."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def byte_tokenizer(special: Sequence[str], **roles: str) -> PreTrainedTokenizerFast:
    """A tokenizer of the 256 bytes, and of special tokens with the ids 256, 257, ...

    Args:
        special: the special tokens.
        roles: which of them are ``bos_token``, ``eos_token``, ``unk_token`` and ``pad_token``.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)
