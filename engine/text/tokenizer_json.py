"""A tokenizer.json file -> its backend and what each of its tokens writes. The library `tokenizers` runs the file as it is.

tokenizer_files.py calls read_tokenizer_json(). What the library does not tell (the exact bytes of a token, what is put
around a text) is read from the file's decoder and post-processor; a kind that is not known there is refused.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer as TokenizerBackend
from tokenizers import models

from engine.errors import BadModelFile, UnsupportedModel
from engine.text.byte_alphabet import spelled_bytes
from engine.text.sentencepiece import BYTE_PIECE
from engine.text.tokenizer_bounds import MAX_CONTENT_CHARACTERS, check_charsmaps, check_growth, parts_of

__all__ = ["TokenizerJson", "read_tokenizer_json"]

CURE = "download the file again"
MAX_PIECE_CHARACTERS = 1 << 16                  # of one token
MAX_AROUND = 16                            # ids around a text; real files have one or two


@dataclass(frozen=True, slots=True)
class TokenizerJson:
    """ids: every token's text -> id. added: ids matched whole in a text, special: those of them that are not shown.

    piece(text, added): the bytes that a token which is not special writes. prefix, suffix: what its post-processor puts
    around a text.
    """

    backend: TokenizerBackend
    ids: dict[str, int]
    added: frozenset[int]
    special: frozenset[int]
    piece: Callable[[str, bool], bytes]
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    drops_first_space: bool


def read_tokenizer_json(text: str, file: str) -> TokenizerJson:
    """Raises BadModelFile for what the library does not read, UnsupportedModel for a part that Rillet does not know."""
    check_charsmaps(text, file)
    try:
        backend = TokenizerBackend.from_str(text)
        backend.no_truncation()            # some files carry what their training cut and filled
        backend.no_padding()
        added = backend.get_added_tokens_decoder()
        ids = backend.get_vocab()
        model, decoder, post_processor = backend.model, _state(backend.decoder), _state(backend.post_processor)
        normalizer, pre_tokenizer = _state(backend.normalizer), _state(backend.pre_tokenizer)
    except Exception as error:             # tokenizers raises bare Exceptions
        raise BadModelFile(f"it is no tokenizer ({str(error)[:200]}): {CURE}", file=file) from error
    except BaseException as error:         # its Rust code panics on some contradictions
        if type(error).__name__ != "PanicException":
            raise
        raise BadModelFile(f"it contradicts itself: {CURE}", file=file) from None
    check_growth(normalizer, pre_tokenizer, file)
    _check_model(model, ids, file)
    piece, drops = _decoder(decoder, file)
    prefix, suffix = _around(post_processor, file)
    return TokenizerJson(
        backend=backend,
        ids=ids,
        added=frozenset(added),
        special=frozenset(token for token, each in added.items() if each.special),
        piece=piece,
        prefix=prefix,
        suffix=suffix,
        drops_first_space=drops,
    )


def _state(part: Any) -> Any:
    """A part of the tokenizer as its JSON; None where the file has none."""
    return None if part is None else json.loads(part.__getstate__())


def _check_model(model: Any, ids: dict[str, int], file: str) -> None:
    if isinstance(model, models.BPE):
        if model.unk_token is not None and model.unk_token not in ids:
            raise BadModelFile(f"its unknown token {model.unk_token[:40]!r} is no token: {CURE}", file=file)
        model.dropout = None               # training's noise
    elif isinstance(model, models.Unigram):
        if json.loads(model.__getstate__()).get("unk_id") is None:
            raise BadModelFile(f"it has no token for unknown characters: {CURE}", file=file)
    else:
        kind = type(model).__name__
        raise UnsupportedModel(f"{file}: its model is {kind}, Rillet reads BPE and Unigram: take another model")


def _decoder(state: Any, file: str) -> tuple[Callable[[str, bool], bytes], bool]:
    """(a token's text and whether it was added -> its bytes, whether the first space of a text is left out)"""
    bytewise, drops, replaced = False, False, []
    for part in parts_of(state, "decoders", "decoder", file):
        match part:
            case {"type": "ByteLevel"}:
                return _spelled, False
            case {"type": "ByteFallback"}:
                bytewise = True
            case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)} if (
                pattern and len(content) <= MAX_CONTENT_CHARACTERS
            ):
                replaced.append((pattern, content))
            case {"type": "Metaspace", "replacement": str(replacement), "prepend_scheme": str(scheme)}:
                replaced.append((replacement, " "))
                drops = drops or scheme != "never"
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0} if start <= 1:
                drops = drops or start == 1
            case {"type": "Fuse"}:
                pass
            case _:
                raise UnsupportedModel(f"{file}: its decoder has {str(part)[:80]}, which Rillet does not know: "
                                       "take another model")
    if not replaced:
        raise UnsupportedModel(f"{file}: its decoder says neither bytes nor spaces, Rillet reads ByteLevel, Metaspace and "
                               "Replace: take another model")

    def piece(text: str, added: bool) -> bytes:
        if bytewise and not added and (match := BYTE_PIECE.fullmatch(text)):
            return bytes([int(match[1], 16)])
        for pattern, content in replaced:
            text = text.replace(pattern, content)
            if len(text) > MAX_PIECE_CHARACTERS:
                raise BadModelFile(f"its decoder makes a token of {len(text):,} characters, {MAX_PIECE_CHARACTERS:,} are "
                                   f"allowed: {CURE}", file=file)
        return text.encode("utf-8", "replace")

    return piece, drops


def _spelled(text: str, added: bool) -> bytes:
    return text.encode("utf-8", "replace") if added else spelled_bytes(text)


def _around(state: Any, file: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(the ids before a text, those behind it)"""
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    for part in parts_of(state, "processors", "post-processor", file):
        if part["type"] == "ByteLevel":    # only moves offsets
            continue
        if part["type"] != "TemplateProcessing":
            raise UnsupportedModel(f"{file}: its post-processor is {str(part['type'])[:40]}, Rillet reads "
                                   "TemplateProcessing: take another model")
        before: list[int] = []
        behind: list[int] = []
        place = before
        for item in part["single"]:
            match item:
                case {"Sequence": _}:
                    place = behind
                case {"SpecialToken": {"id": str(name)}} if name in part["special_tokens"]:
                    place.extend(part["special_tokens"][name]["ids"])
                case _:
                    raise BadModelFile(f"its post-processor has {str(item)[:80]}: {CURE}", file=file)
            if (count := len(prefix) + len(before) + len(behind) + len(suffix)) > MAX_AROUND:
                raise BadModelFile(f"its post-processor puts {count:,} ids around a text, {MAX_AROUND} are allowed: {CURE}",
                                   file=file)
        prefix, suffix = tuple(before) + prefix, suffix + tuple(behind)
    return prefix, suffix
