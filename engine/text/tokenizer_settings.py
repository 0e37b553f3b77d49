"""TokenizerSettings: what a model folder says about its tokenizer beside the vocabulary, and the bounded reading of files.

tokenizer_files.py asks it for the begin and end tokens, the added tokens and the chat template. Where files contradict
each other they are settled as transformers 5 settles them. No file is read without a bound on its size.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import BadModelFile

__all__ = ["AddedPiece", "TokenizerSettings", "read_bytes", "read_settings", "read_text"]

CURE = "download the file again"
MAX_SETTINGS_BYTES = 4 << 20
MAX_ID_DIGITS = 9
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LISTED = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True, slots=True, order=True)
class AddedPiece:
    """A token that was added to a vocabulary."""

    id: int
    text: str
    special: bool


@dataclass(frozen=True, slots=True)
class TokenizerSettings:
    """bos, eos: those tokens' texts. special: every text that is named as a special token. chat_template: as written.

    adds_bos, adds_eos: whether they go around a text, space_prefix: whether a space may go before it; a tokenizer.json
    says that itself and is believed.
    """

    bos: str | None
    eos: str | None
    special: frozenset[str]
    added: tuple[AddedPiece, ...]
    adds_bos: bool
    adds_eos: bool
    space_prefix: bool
    chat_template: object


def read_settings(folder: Path) -> TokenizerSettings:
    """tokenizer_config.json; where that does not list added tokens, special_tokens_map.json goes before it."""
    values = _json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" in values:
        added = _listed_tokens(values["added_tokens_decoder"])
    else:
        values |= _json(folder / "special_tokens_map.json")
        special = frozenset(_special_texts(values))
        texts = _json(folder / "added_tokens.json")
        added = (AddedPiece(token, text, text in special) for text, token in texts.items() if type(token) is int)
    return TokenizerSettings(
        bos=_text_of(values.get("bos_token")),
        eos=_text_of(values.get("eos_token")),
        special=frozenset(_special_texts(values)),
        added=tuple(sorted(added)),
        adds_bos=bool(values.get("add_bos_token", True)),      # Llama 2's own code and llama.cpp do so
        adds_eos=bool(values.get("add_eos_token", False)),
        space_prefix=values.get("add_prefix_space") is not False,
        chat_template=values.get("chat_template"),
    )


def _listed_tokens(listed: object) -> Iterator[AddedPiece]:
    for key, value in listed.items() if isinstance(listed, dict) else ():
        text = _text_of(value)
        if text and key.isdecimal() and len(key) <= MAX_ID_DIGITS:
            yield AddedPiece(int(key), text, isinstance(value, dict) and value.get("special") is True)


def _special_texts(values: Mapping[str, Any]) -> Iterator[str]:
    for value in (values.get(key) for key in NAMED):
        if text := _text_of(value):
            yield text
    for value in (values.get(key) for key in LISTED):
        for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            if text := _text_of(each):
                yield text


def _text_of(value: object) -> str | None:
    """A token is written as its text or as an object with it."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _json(path: Path) -> dict[str, Any]:
    """An object from a small file; {} if there is none."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(read_text(path, MAX_SETTINGS_BYTES))
    except (ValueError, RecursionError) as error:
        raise BadModelFile(f"it is no JSON ({str(error)[:100]}): {CURE}", file=str(path)) from error
    if not isinstance(value, dict):
        raise BadModelFile(f"it is no JSON object: {CURE}", file=str(path))
    return value


def read_text(path: Path, limit: int) -> str:
    """A file of UTF-8 with at most `limit` bytes. Raises BadModelFile."""
    try:
        return read_bytes(path, limit).decode()
    except UnicodeDecodeError:
        raise BadModelFile(f"it is no UTF-8: {CURE}", file=str(path)) from None


def read_bytes(path: Path, limit: int) -> bytes:
    """A file of at most `limit` bytes. Raises BadModelFile."""
    try:
        with path.open("rb") as stream:
            data = stream.read(limit + 1)
    except OSError as error:
        raise BadModelFile(f"it cannot be read ({error.strerror}): check its rights", file=str(path)) from error
    if len(data) > limit:
        raise BadModelFile(f"it has more than {limit:,} bytes: {CURE}", file=str(path))
    return data
