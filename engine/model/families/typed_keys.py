"""TypedKeys: typed, bounded reading of a model's metadata, and the memory of which keys were read.

GgufMetadata and ConfigJson are the two kinds. A missing, mistyped or absurd value is a BadModelFile that names the key; a
key that nobody read and that is not known to be harmless is UnsupportedModel, because it may change the mathematics.
"""

import reprlib
from collections.abc import Mapping

from engine.errors import BadModelFile, UnsupportedModel

__all__ = ["TypedKeys", "short"]


class TypedKeys:
    """A table of keys. A key whose value is None counts as absent."""

    cure = "download the file again"
    harmless: frozenset[str] = frozenset()

    def __init__(self, values: Mapping[str, object], file: str, prefix: str = "", model: str = "model") -> None:
        self.values = values
        self.file = file
        self.prefix = prefix               # before every key, with its dot
        self.model = model                 # what messages call the model
        self._read: set[str] = set()

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """An integer in [low, high]; without a default the key must be there."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.bad(key, value, f"an integer from {low:,} to {high:,}")
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """A finite number in [low, high]; without a default the key must be there."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.bad(key, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def optional_integer(self, key: str, low: int, high: int) -> int | None:
        return self.integer(key, low, high) if self.has(key) else None

    def optional_number(self, key: str, low: float, high: float) -> float | None:
        return self.number(key, low, high) if self.has(key) else None

    def boolean(self, key: str, default: bool | None = None) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.bad(key, value, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.bad(key, value, "a text")
        return value

    def has(self, key: str) -> bool:
        self._read.add(key)
        return self.values.get(self.prefix + key) is not None

    def must_be(self, key: str, *allowed: object) -> None:
        """If the key is there, it must say what this family does anyway."""
        if self.has(key) and (value := self._get(key, None)) not in allowed:
            raise UnsupportedModel(
                f"{self.file}: {self.prefix}{key} is {short(value)}, Rillet's {self.model} supports "
                f"{' or '.join(repr(each) for each in allowed)} only: take another model"
            )

    def ignore(self, *keys: str) -> None:
        """These keys mean nothing here, whatever they say."""
        self._read.update(keys)

    def unread(self) -> list[str]:
        """Full names of the keys under the prefix that were neither read nor are known to be harmless."""
        known = self._read | self.harmless
        return sorted(
            key
            for key, value in self.values.items()
            if key.startswith(self.prefix) and value is not None and key.removeprefix(self.prefix) not in known
        )

    def refuse_unread(self) -> None:
        """Raise UnsupportedModel if unread() has any: what they say would be left out."""
        if unknown := self.unread():
            raise UnsupportedModel(
                f"{self.file}: this {self.model} model has keys that Rillet does not know and that may change its "
                f"mathematics ({', '.join(key[:80] for key in unknown[:8])}): upgrade Rillet, or take another conversion"
            )

    def bad(self, key: str, value: object, wanted: str) -> BadModelFile:
        found = "is missing" if value is None else f"is {short(value)}"
        return BadModelFile(f"{self.prefix}{key} {found}, it must be {wanted}: {self.cure}", file=self.file)

    def _get(self, key: str, default: object) -> object:
        self._read.add(key)
        value = self.values.get(self.prefix + key)
        return default if value is None else value


def short(value: object) -> str:
    """The value for a message; Python refuses to print integers of thousands of digits."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length():,} bits"
    return reprlib.repr(value)
