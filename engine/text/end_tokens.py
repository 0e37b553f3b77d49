"""Tokens that end a turn, known by their text. Every reader of a vocabulary asks here, so that all formats end alike.

Files often name one end token and forget another; a model that is not stopped by it talks to itself.
"""

from collections.abc import Mapping

__all__ = ["END_MARKERS", "END_WORDS", "end_tokens"]

# A marker even where a converter forgot to say so.
END_MARKERS = frozenset({
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<|return|>", "<|call|>",
    "<｜end▁of▁sentence｜>",
})
# Ordinary words in some vocabularies: they count only where the file marks them.
END_WORDS = frozenset({"</s>", "<eos>", "<EOT>", "[EOT]", "[EOS]", "<end_of_turn>", "<end_of_utterance>"})


def end_tokens(special: Mapping[str, int]) -> frozenset[int]:
    """The ids that end a turn among a vocabulary's special tokens (text -> id)."""
    ends = {text for text in END_MARKERS | END_WORDS if text in special}
    if {"<|return|>", "<|call|>"} <= ends:                     # gpt-oss: <|end|> only ends one message of several
        ends.discard("<|end|>")
    return frozenset(special[text] for text in ends)
