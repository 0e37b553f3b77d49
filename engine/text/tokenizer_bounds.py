"""What the parts of a tokenizer.json may be, so that a small file cannot make a text huge: bounds before anything is run.

tokenizer_json.py calls check_charsmaps() before the library reads the file, and check_growth() before a text is encoded.
Real files replace a space by ▁ and put one before a text; what grows a text again and again is no tokenizer.
"""

import base64
import json
import re
from collections.abc import Iterator
from typing import Any

from engine.errors import BadModelFile, UnsupportedModel

__all__ = ["MAX_CONTENT_CHARACTERS", "check_charsmaps", "check_growth", "parts_of"]

CURE = "download the file again"
MAX_PARTS = 16
MAX_CONTENT_CHARACTERS = 64                # of what is put into a text
MAX_GROWING, MAX_GROWTH = 2, 4             # parts that make a text longer, and how many times longer each may make it
MAX_MAPPED_BYTES = 64                      # NFKC's longest is U+FDFA, 33 bytes
_CHARSMAP = "precompiled_charsmap"
# JSON may spell the key's letters as escapes; no writer does, so the file is parsed here only if it has one
_MAY_HAVE_CHARSMAP = re.compile(_CHARSMAP + r"|\\u00[4-7]")
_KINDS = frozenset((
    "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "Nmt", "BertNormalizer", "Precompiled", "ByteLevel",
))
_ONCE = frozenset(("Precompiled", "ByteLevel"))      # each application makes some characters longer


def parts_of(state: Any, key: str, what: str, file: str) -> list[dict[str, Any]]:
    """A part, or the parts of a sequence of them, however nested; at most MAX_PARTS. Raises UnsupportedModel."""
    parts: list[dict[str, Any]] = []
    for part in _flat(state, key):
        parts.append(part)
        if len(parts) > MAX_PARTS:
            raise UnsupportedModel(f"{file}: its {what} has more than {MAX_PARTS} parts: take another model")
    return parts


def _flat(state: Any, key: str) -> Iterator[dict[str, Any]]:
    if state is None:
        return
    if state["type"] != "Sequence":
        yield state
        return
    for each in state[key]:
        yield from _flat(each, key)


def check_growth(normalizer: Any, pre_tokenizer: Any, file: str) -> None:
    """Raises UnsupportedModel for parts that are not known, or that make a text much longer."""
    parts = parts_of(normalizer, "normalizers", "normalizer", file)
    growing = 0
    for part in parts:
        match part:
            case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)}:
                before, grows = max(1, len(pattern)), len(content) > len(pattern)
            case {"type": "Replace", "pattern": {"Regex": str()}, "content": str(content)}:
                before, grows = 1, bool(content)       # it may match between any two characters
            case {"type": "Prepend", "prepend": str(content)}:
                before, grows = 1, True
            case {"type": str(kind)} if kind in _KINDS:
                continue
            case _:
                raise UnsupportedModel(f"{file}: its normalizer has {str(part)[:80]}, which Rillet does not know: "
                                       "take another model")
        growing += grows
        if growing > MAX_GROWING or len(content) > MAX_CONTENT_CHARACTERS or (grows and len(content) > MAX_GROWTH * before):
            raise UnsupportedModel(f"{file}: its normalizer makes texts much longer ({str(part)[:80]}): at most "
                                   f"{MAX_GROWING} parts may, each up to {MAX_GROWTH} times: take another model")
    kinds = [part["type"] for part in parts + parts_of(pre_tokenizer, "pretokenizers", "pre-tokenizer", file)]
    for kind in sorted(_ONCE):
        if kinds.count(kind) > 1:
            raise UnsupportedModel(f"{file}: it has {kind} {kinds.count(kind)} times, once is allowed: take another model")


def check_charsmaps(text: str, file: str) -> None:
    """Raises BadModelFile for a character map whose lengths its data does not have. The library reserves what they say."""
    if _MAY_HAVE_CHARSMAP.search(text) is None:
        return
    found: list[Any] = []

    def keep(pairs: list[tuple[str, Any]]) -> None:
        found.extend(value for key, value in pairs if key == _CHARSMAP and isinstance(value, str))

    try:
        json.loads(text, object_pairs_hook=keep)
        for value in found:
            _check_charsmap(base64.b64decode(value, validate=True), file)
    except (ValueError, RecursionError) as error:
        raise BadModelFile(f"it is no tokenizer ({str(error)[:200]}): {CURE}", file=file) from error


def _check_charsmap(data: bytes, file: str) -> None:
    """Four bytes with the trie's length, the trie, and the texts it leads to, each ended by a zero."""
    trie = int.from_bytes(data[:4], "little")
    if len(data) < 4 or trie > len(data) - 4:
        raise BadModelFile(f"its character map announces {trie:,} bytes and has {len(data):,}, so it is no tokenizer: {CURE}",
                           file=file)
    if (longest := max(map(len, data[4 + trie :].split(b"\0")))) > MAX_MAPPED_BYTES:
        raise BadModelFile(f"its character map makes a character {longest:,} bytes long, {MAX_MAPPED_BYTES} are allowed: "
                           f"{CURE}", file=file)
