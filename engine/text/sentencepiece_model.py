"""A tokenizer.model file (sentencepiece's own, a protocol buffer) -> pieces and what its trainer and normalizer say.

tokenizer_files.py calls read_sentencepiece_model() for a folder without tokenizer.json. Only the fields that tokenizing
needs are read. The file is hostile until proven otherwise: no length is used before it is compared with the bytes left.
Format: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import isnan

from engine.errors import BadModelFile, UnsupportedModel
from engine.text.gguf_values import BYTE, NORMAL
from engine.text.sentencepiece import Piece

__all__ = ["SentencePieceModel", "read_sentencepiece_model"]

CURE = "download the file again, or a tokenizer.json beside it"
MAX_PIECES = 1 << 20
# Fields of one message: the file's own beside its pieces, a piece's, and the trainer's, which lists symbols of its user
MAX_OTHER_FIELDS, MAX_PIECE_FIELDS, MAX_SETTING_FIELDS = 64, 16, 1 << 16
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5                   # how a field's value is written
UNIGRAM, BPE = 1, 2                                            # TrainerSpec.model_type
# A field's number in its message
PIECES, TRAINER, NORMALIZER = 1, 2, 3
TEXT, SCORE, KIND = 1, 2, 3
MODEL_TYPE, SPACE_AS_SUFFIX, UNKNOWN_ID, BOS_ID, EOS_ID = 3, 24, 40, 41, 42
CHARACTER_MAP, DUMMY_PREFIX, SQUEEZE_SPACES, ESCAPE_SPACES = 2, 3, 4, 5

PIECE_FIELDS = frozenset((TEXT, SCORE, KIND))
TRAINER_FIELDS = frozenset((MODEL_TYPE, SPACE_AS_SUFFIX, UNKNOWN_ID, BOS_ID, EOS_ID))
NORMALIZER_FIELDS = frozenset((CHARACTER_MAP, DUMMY_PREFIX, SQUEEZE_SPACES, ESCAPE_SPACES))


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """Ids are None where the model has no such token. space_prefix, squeeze_spaces: what its normalizer does."""

    pieces: list[Piece]
    unigram: bool
    unknown_id: int | None
    bos_id: int | None
    eos_id: int | None
    space_prefix: bool
    squeeze_spaces: bool


def read_sentencepiece_model(data: bytes, file: str) -> SentencePieceModel:
    """Raises BadModelFile for damage, UnsupportedModel for a kind or a normalizer that Rillet does not have."""
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    others = settings = 0
    for number, value in _fields(data, file):
        if number == PIECES and isinstance(value, bytes):
            if len(pieces) == MAX_PIECES:
                raise BadModelFile(f"it has more than {MAX_PIECES:,} pieces: {CURE}", file=file)
            pieces.append(_piece(_known(value, PIECE_FIELDS, MAX_PIECE_FIELDS, file), len(pieces), file))
            continue
        others += 1
        if others > MAX_OTHER_FIELDS:
            raise BadModelFile(f"it has more than {MAX_OTHER_FIELDS} fields beside its pieces: {CURE}", file=file)
        if number in (TRAINER, NORMALIZER) and isinstance(value, bytes):
            settings += 1
            if settings > 2:               # the trainer's and the normalizer's
                raise BadModelFile(f"it has its settings more than once: {CURE}", file=file)
            if number == TRAINER:
                trainer = _known(value, TRAINER_FIELDS, MAX_SETTING_FIELDS, file)
            else:
                normalizer = _known(value, NORMALIZER_FIELDS, MAX_SETTING_FIELDS, file)
    if not pieces:
        raise BadModelFile(f"it has no pieces, so it is no sentencepiece model: {CURE}", file=file)
    kind = _number(trainer, MODEL_TYPE, UNIGRAM)
    if kind not in (UNIGRAM, BPE):
        raise UnsupportedModel(f"{file}: its model type is number {kind}, Rillet reads unigram (1) and BPE (2): "
                               "take a model with a tokenizer.json")
    if normalizer.get(CHARACTER_MAP) or _number(trainer, SPACE_AS_SUFFIX, 0) or not _number(normalizer, ESCAPE_SPACES, 1):
        raise UnsupportedModel(f"{file}: it maps characters before it cuts the text, which Rillet reads only from a "
                               "tokenizer.json: take a model that has one")
    return SentencePieceModel(
        pieces=pieces,
        unigram=kind == UNIGRAM,
        unknown_id=_token(trainer, UNKNOWN_ID, 0, len(pieces)),
        bos_id=_token(trainer, BOS_ID, 1, len(pieces)),
        eos_id=_token(trainer, EOS_ID, 2, len(pieces)),
        space_prefix=bool(_number(normalizer, DUMMY_PREFIX, 1)),
        squeeze_spaces=bool(_number(normalizer, SQUEEZE_SPACES, 1)),
    )


def _piece(fields: dict[int, int | bytes], token: int, file: str) -> Piece:
    text, score, kind = fields.get(TEXT, b""), fields.get(SCORE, bytes(4)), fields.get(KIND, NORMAL)
    if not isinstance(text, bytes) or not isinstance(score, bytes) or len(score) != 4 or not isinstance(kind, int):
        raise BadModelFile(f"piece {token:,} has fields of wrong types: {CURE}", file=file)
    value: float = struct.unpack("<f", score)[0]
    if isnan(value) or not NORMAL <= kind <= BYTE:
        raise BadModelFile(f"piece {token:,} has the score {value} and the type {kind}: {CURE}", file=file)
    return Piece(text.decode("utf-8", "replace"), value, kind)


def _number(fields: dict[int, int | bytes], number: int, default: int) -> int:
    value = fields.get(number, default)
    return value if isinstance(value, int) else default


def _token(fields: dict[int, int | bytes], number: int, default: int, count: int) -> int | None:
    """An id; those that a model does not have are written as -1, here 2^64 - 1."""
    value = _number(fields, number, default)
    return value if value < count else None


def _known(data: bytes, numbers: frozenset[int], most: int, file: str) -> dict[int, int | bytes]:
    """The fields of a message that are in `numbers`, the last of each; a message has at most `most` fields."""
    fields: dict[int, int | bytes] = {}
    for count, (number, value) in enumerate(_fields(data, file)):
        if count == most:
            raise BadModelFile(f"one of its messages has more than {most:,} fields: {CURE}", file=file)
        if number in numbers:
            fields[number] = value
    return fields


def _fields(data: bytes, file: str) -> Iterator[tuple[int, int | bytes]]:
    """The fields of one message in the file's order: (number, an integer or its bytes)."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position, file)
        number, wire = key >> 3, key & 7
        if wire == VARINT:
            value, position = _varint(data, position, file)
            yield number, value
            continue
        if wire == BYTES:
            length, position = _varint(data, position, file)
        elif wire in (FIXED32, FIXED64):
            length = 4 if wire == FIXED32 else 8
        else:
            raise BadModelFile(f"byte {position:,} begins a field of the unknown kind {wire}: {CURE}", file=file)
        if length > len(data) - position:
            raise BadModelFile(f"{length:,} bytes are announced at byte {position:,} of {len(data):,}: {CURE}", file=file)
        yield number, data[position : position + length]
        position += length


def _varint(data: bytes, position: int, file: str) -> tuple[int, int]:
    """(a number written in groups of seven bits, the position behind it)"""
    value = shift = 0
    for place in range(position, min(position + 10, len(data))):
        value |= (data[place] & 0x7F) << shift
        if data[place] < 0x80:
            return value, place + 1
        shift += 7
    raise BadModelFile(f"byte {position:,} begins a number that does not end: {CURE}", file=file)
