"""GgufValues: typed, checked reading of a GGUF file's `tokenizer.ggml.*` keys, for every kind of vocabulary.

A file is hostile until proven otherwise: what comes out of here has the right type, length and range.
"""

from collections.abc import Mapping, Sequence
from math import isnan
from typing import cast

from engine.errors import BadModelFile

__all__ = ["BYTE", "CONTROL", "NORMAL", "UNKNOWN", "UNUSED", "USER_DEFINED", "GgufValues"]

PREFIX = "tokenizer.ggml."
CURE = "download the file again, or take another conversion"
MAX_TOKEN_CHARACTERS = 1 << 16

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of tokens, numbered as GGUF and sentencepiece do."""


class GgufValues:
    """`values`: the file's metadata. Every method raises BadModelFile naming the key that is wrong."""

    def __init__(self, values: Mapping[str, object], file: str) -> None:
        self.values = values
        self.file = file

    def bad(self, key: str, message: str) -> BadModelFile:
        return BadModelFile(f"{PREFIX}{key} {message}: {CURE}", file=self.file)

    def texts(self, key: str) -> list[str]:
        value = self.values.get(PREFIX + key)
        if not isinstance(value, list) or not value or not all(type(each) is str for each in value):
            raise self.bad(key, "must be a list of texts")
        return cast(list[str], value)

    def tokens(self, rows: int) -> list[str]:
        """The tokens' texts, the empty ones renamed as llama.cpp does; twice the same text would make an id unreachable."""
        texts = self.texts("tokens")
        if len(texts) > rows:
            raise self.bad("tokens", f"has {len(texts):,} entries, the embedding has {rows:,} rows")
        named = [text or f"[EMPTY_{token}]" for token, text in enumerate(texts)]
        if len(set(named)) != len(named):
            seen: set[str] = set()
            double = next(text for text in named if text in seen or seen.add(text))   # type: ignore[func-returns-value]
            raise self.bad("tokens", f"has {double[:40]!r} twice")
        if (longest := max(map(len, named))) > MAX_TOKEN_CHARACTERS:
            raise self.bad("tokens", f"has a token of {longest:,} characters, {MAX_TOKEN_CHARACTERS:,} are allowed")
        return named

    def types(self, count: int) -> list[int]:
        value = self.values.get(PREFIX + "token_type", [NORMAL] * count)
        if not isinstance(value, list) or not all(type(each) is int for each in value):
            raise self.bad("token_type", "must be a list of integers")
        if len(value) != count:
            raise self.bad("token_type", f"has {len(value):,} entries for {count:,} tokens")
        return cast(list[int], value)

    def scores(self, count: int) -> Sequence[float]:
        value = self.values.get(PREFIX + "scores")
        if not isinstance(value, list) or not all(type(each) is float for each in value) or any(map(isnan, value)):
            raise self.bad("scores", "must be a list of numbers")
        if len(value) != count:
            raise self.bad("scores", f"has {len(value):,} entries for {count:,} tokens")
        return cast(list[float], value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(PREFIX + key, default)
        if not isinstance(value, bool):
            raise self.bad(key, f"is {value!r}, it must be true or false")
        return value

    def token(self, key: str, count: int, default: int | None = None) -> int | None:
        value = self.values.get(f"{PREFIX}{key}_token_id")
        if value is None or value == 0xFFFFFFFF:               # some converters write "none" so
            return default if value is None and default is not None and default < count else None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
            raise self.bad(f"{key}_token_id", f"is {value!r}, ids go from 0 to {count - 1:,}")
        return value
