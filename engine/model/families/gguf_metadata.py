"""GgufMetadata: typed, bounded reading of a GGUF file's metadata, and the memory of which keys were read.

The families ask it for numbers; a missing, mistyped or absurd value is a BadModelFile that names the key. A family that
has read all it knows calls refuse_unread(): what is left under its architecture's prefix would change the mathematics.
"""

from collections.abc import Mapping
from math import isfinite

from engine.errors import BadModelFile, UnsupportedModel

__all__ = ["GgufMetadata"]

CURE = "download the file again, or take another conversion"

# Keys under `{architecture}.` that say nothing about the arithmetic of a dense decoder.
HARMLESS = frozenset({
    "attention.group_norm_epsilon",
    "attention.layer_norm_epsilon",        # of families with LayerNorm; ours read layer_norm_rms_epsilon
    "rope.scaling.finetuned",
    "tensor_data_layout",
    "training_context_length",
})


class GgufMetadata:
    """The metadata of one file. Keys are given without the prefix `{architecture}.`"""

    def __init__(self, values: Mapping[str, object], file: str) -> None:
        self.values = values
        self.file = file
        architecture = values.get("general.architecture")
        if not isinstance(architecture, str):
            raise BadModelFile(f"general.architecture is {architecture!r}, it must be a name: {CURE}", file=file)
        self.architecture = architecture
        self._read: set[str] = set()

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """An integer in [low, high]; without a default the key must be there."""
        value = self._get(key, default)
        if isinstance(value, list):
            return self._same_everywhere(key, value, low, high)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.bad(key, value, f"an integer from {low:,} to {high:,}")
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """A finite number in [low, high]; without a default the key must be there."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value) or not low <= value <= high:
            raise self.bad(key, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def optional_number(self, key: str, low: float, high: float) -> float | None:
        return self.number(key, low, high) if self.has(key) else None

    def text(self, key: str, default: str) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.bad(key, value, "a text")
        return value

    def has(self, key: str) -> bool:
        return self._name(key) in self.values

    def must_be(self, key: str, *allowed: object) -> None:
        """If the key is there, it must say what this family does anyway."""
        if self.has(key) and (value := self._get(key, None)) not in allowed:
            raise UnsupportedModel(
                f"{self.file}: {self._name(key)} is {value!r}, Rillet's {self.architecture} supports "
                f"{' or '.join(repr(each) for each in allowed)} only: take another model"
            )

    def refuse_unread(self) -> None:
        """Raise UnsupportedModel if a key of this architecture was neither read nor is known to be harmless."""
        prefix = f"{self.architecture}."
        known = self._read | {self._name(key) for key in HARMLESS}
        unknown = sorted(key for key in self.values if key.startswith(prefix) and key not in known)
        if unknown:
            raise UnsupportedModel(
                f"{self.file}: this {self.architecture} model has keys that Rillet does not know and that may change its "
                f"mathematics ({', '.join(unknown[:8])}): upgrade Rillet, or take another conversion"
            )

    def bad(self, key: str, value: object, wanted: str) -> BadModelFile:
        found = "is missing" if value is None else f"is {str(value)[:80]}"
        return BadModelFile(f"{self._name(key)} {found}, it must be {wanted}: {CURE}", file=self.file)

    def _name(self, key: str) -> str:
        return f"{self.architecture}.{key}"

    def _get(self, key: str, default: object) -> object:
        name = self._name(key)
        self._read.add(name)
        return self.values.get(name, default)

    def _same_everywhere(self, key: str, value: list[object], low: int, high: int) -> int:
        first = value[0] if value else None
        if isinstance(first, bool) or not isinstance(first, int) or not low <= first <= high:
            raise self.bad(key, value, f"integers from {low:,} to {high:,}")
        if any(each != first for each in value):
            raise UnsupportedModel(
                f"{self.file}: {self._name(key)} differs from layer to layer, which Rillet's {self.architecture} does "
                "not support: take another model"
            )
        return first
