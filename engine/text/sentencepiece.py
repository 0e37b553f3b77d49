"""A sentencepiece vocabulary -> Tokenizer, whether it came from GGUF or from a tokenizer.model file.

BPE merges are the pairs of pieces that make a piece, best score first; sentencepiece and llama.cpp search for them while
they encode, here they are listed once. A space is written as ▁ (U+2581), a character that has no piece becomes its bytes'
pieces `<0x0A>`. The space that such a model wants at the start of a text is put in by encode() and left out by decode();
it is put in behind every marker too, as llama.cpp does and as the models' first tokenizers did.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from tokenizers import AddedToken, Regex, models, normalizers
from tokenizers import Tokenizer as TokenizerBackend

from engine.errors import BadModelFile
from engine.text.gguf_values import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from engine.text.tokenizer import Tokenizer

__all__ = ["BYTE_PIECE", "SPACE", "Piece", "sentencepiece_tokenizer"]

SPACE = "\u2581"
BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
CURE = "download the file again, or take another conversion"
MAX_PIECE_CHARACTERS = 1 << 10             # of a piece that merges make; sentencepiece's own default is 16
MAX_ALL_CHARACTERS = 1 << 23               # a vocabulary of 256k pieces has 2 million
MAX_MERGES, MAX_MERGED_CHARACTERS = 1 << 21, 1 << 26     # Gemma's 256k pieces have 600 thousand merges
# Phi-3's marks that leave the spaces behind them alone
_KEEPS_SPACES = frozenset({"<unk>", "<s>", "<|endoftext|>"})


class Piece(NamedTuple):
    """kind: one of the token types in gguf_values."""

    text: str
    score: float
    kind: int


def sentencepiece_tokenizer(
    pieces: Sequence[Piece],
    *,
    file: str,
    rows: int,
    unknown_id: int | None,
    bos_id: int | None,
    eos_id: int | None,
    end_ids: frozenset[int],
    prefix: tuple[int, ...] = (),
    suffix: tuple[int, ...] = (),
    space_prefix: bool = True,
    strip_behind_markers: bool = False,
    squeeze_spaces: bool = False,
    unigram: bool = False,
) -> Tokenizer:
    """The tokenizer of `pieces`, whose places are their ids; `rows` of the embedding pad them.

    squeeze_spaces: runs of spaces are one space and those at the ends go, as a normalizer of sentencepiece does.
    unigram: the likeliest cut by the sum of scores instead of merges. Raises BadModelFile naming `file`.
    """
    if sum(len(piece.text) for piece in pieces) > MAX_ALL_CHARACTERS:
        raise BadModelFile(f"its tokens have more than {MAX_ALL_CHARACTERS:,} characters: {CURE}", file=file)
    if unknown_id is None and (unigram or sum(piece.kind == BYTE for piece in pieces) < 256):
        raise BadModelFile(f"it has no token for unknown characters: {CURE}", file=file)      # they would be lost silently
    try:
        backend = TokenizerBackend(_unigram(pieces, unknown_id) if unigram else _bpe(pieces, unknown_id, file))
    except BadModelFile:
        raise
    except Exception as error:             # tokenizers raises bare Exceptions
        raise BadModelFile(f"its vocabulary contradicts itself ({error}): {CURE}", file=file) from error
    squeeze = [normalizers.Replace(Regex(r"\A +| +\z| +(?= )"), "")] if squeeze_spaces else []
    first = [normalizers.Prepend(SPACE)] if space_prefix else []
    backend.normalizer = normalizers.Sequence([*squeeze, *first, normalizers.Replace(" ", SPACE)])
    backend.add_special_tokens([
        AddedToken(text, normalized=False, rstrip=strip_behind_markers and text not in _KEEPS_SPACES)
        for text, _, kind in pieces
        if kind in (CONTROL, UNKNOWN)
    ])
    backend.add_tokens([AddedToken(text, normalized=False) for text, _, kind in pieces if kind == USER_DEFINED])
    return Tokenizer(
        backend,
        pieces=tuple(_bytes(piece, file) for piece in pieces) + (b"",) * (rows - len(pieces)),
        special_ids=frozenset(token for token, piece in enumerate(pieces) if piece.kind in (CONTROL, UNKNOWN)),
        bos_id=bos_id,
        eos_id=eos_id,
        end_ids=end_ids,
        prefix=prefix,
        suffix=suffix,
        drops_first_space=space_prefix,
    )


def _bpe(pieces: Sequence[Piece], unknown_id: int | None, file: str) -> models.BPE:
    unknown = None if unknown_id is None else pieces[unknown_id].text
    vocabulary = {piece.text: token for token, piece in enumerate(pieces)}
    return models.BPE(vocabulary, _merges(pieces, file), unk_token=unknown, fuse_unk=True, byte_fallback=True)


def _merges(pieces: Sequence[Piece], file: str) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, in the order in which they are merged.

    Best score first, then the lower id; of a piece's own pairs the one with the longer left part, which is what going
    from left to right through a run of one character leads to.
    """
    plain = {piece.text: token for token, piece in enumerate(pieces) if piece.kind in (NORMAL, USER_DEFINED, UNUSED)}
    found: list[tuple[float, int, int]] = []
    characters = 0
    for text, token in plain.items():
        if len(text) > MAX_PIECE_CHARACTERS:
            raise BadModelFile(f"it has a token of {len(text):,} characters, {MAX_PIECE_CHARACTERS:,} are allowed: {CURE}",
                               file=file)
        score = -pieces[token].score
        count = len(found)
        found += [(score, token, -cut) for cut in range(1, len(text)) if text[:cut] in plain and text[cut:] in plain]
        characters += (len(found) - count) * len(text)
        if len(found) > MAX_MERGES or characters > MAX_MERGED_CHARACTERS:
            raise BadModelFile(f"its tokens are made by more than {MAX_MERGES:,} merges, or those have more than "
                               f"{MAX_MERGED_CHARACTERS:,} characters: {CURE}", file=file)
    found.sort()
    return [(pieces[token].text[:-cut], pieces[token].text[-cut:]) for _, token, cut in found]


def _unigram(pieces: Sequence[Piece], unknown_id: int | None) -> models.Unigram:
    scores = [(piece.text, piece.score) for piece in pieces]
    return models.Unigram(scores, unknown_id, byte_fallback=any(piece.kind == BYTE for piece in pieces))


def _bytes(piece: Piece, file: str) -> bytes:
    """What a token writes. Markers stand for their own text; unused ones are padding of the table."""
    text, _, kind = piece
    if kind in (CONTROL, UNKNOWN):
        return text.encode("utf-8", "replace")
    if kind == UNUSED:
        return b""
    if kind in (BYTE, NORMAL) and (match := BYTE_PIECE.fullmatch(text)):
        return bytes([int(match[1], 16)])
    if kind == BYTE:
        raise BadModelFile(f"its token {text[:40]!r} is of the type byte, it must look like <0x0A>: {CURE}", file=file)
    return text.replace(SPACE, " ").encode("utf-8", "replace")
