"""Which files of a hub repository make up the model that is meant: a pure choice over a list of names.

hub.py gives the names that a hub lists or that its cache has, models.py those of a whole cache. Nothing is opened or
downloaded here, and no name that could leave the repository's folder gets through. Pickles are never chosen.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from engine.errors import ModelNotFound

__all__ = [
    "INDEX",
    "SINGLE",
    "Repository",
    "Variant",
    "choose_variant",
    "gguf_variants",
    "parts_of",
    "safe_names",
    "safetensors_files",
]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DEFAULTS = ("Q4_K_M", "Q4_K_S", "Q4_0", "Q5_K_M", "Q5_K_S", "Q6_K", "Q8_0")
"""Quantizations taken when none is named, the first that is there; else the first file by name."""

COMPANIONS = ("tokenizer.model", "additional_chat_templates/tool_use.jinja")               # besides *.json and *.jinja
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
NO_MODEL = re.compile(r"(?<![a-z])(mmproj|imatrix)(?![a-z])")                # GGUF files beside a model's
SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE | re.DOTALL)
LABEL = re.compile(
    r"(?<![A-Z0-9])(?:UD-)?(?:I?Q[1-8](?:_[0-9A-Z]+)*|TQ[12]_0|BF16|FP?16|FP?32|MXFP4(?:_MOE)?|NVFP4)(?![A-Z0-9])"
)
MAX_PARTS = 1000
MAX_NAME = 500
SHOWN = 12                                               # names that an error lists at most


class Repository(Protocol):
    """One model's repository on a hub, at one revision."""

    def names(self) -> Sequence[str]:
        """Its files, with / between folders; offline those in the cache. Raises ModelNotFound."""
        ...

    def fetch(self, names: Sequence[str]) -> Path:
        """Bring these files into the cache; the folder in which they are, under their names. Raises ModelNotFound."""
        ...


@dataclass(frozen=True, slots=True)
class Variant:
    """One model in GGUF: a file, or all parts of a split one in their order. label: Q4_K_M, or None where no name tells."""

    label: str | None
    files: tuple[str, ...]
    missing: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.files[0]


def safe_names(names: Iterable[str]) -> tuple[str, ...]:
    """Those that are plain relative paths on every system; a hostile hub's others are left out."""
    return tuple(name for name in names if _is_safe(name))


def _is_safe(name: object) -> bool:
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable():
        return False
    if any(character in name for character in '\\:*?"<>|'):
        return False
    return all(part not in ("", ".", "..") and not part.endswith((".", " ")) for part in name.split("/"))


# ---- GGUF -------------------------------------------------------------------------------------------------------------


def gguf_variants(names: Iterable[str]) -> tuple[Variant, ...]:
    """The GGUF models among `names`, by name; parts of a split one belong together."""
    files = {name for name in names if name.lower().endswith(".gguf") and not NO_MODEL.search(_base(name).lower())}
    variants: dict[str, Variant] = {}
    for name in sorted(files):
        parts = parts_of(name)
        there = tuple(part for part in parts if part in files)
        variants.setdefault(parts[0], Variant(_label(parts[0]), there, tuple(part for part in parts if part not in files)))
    return tuple(variants.values())


def parts_of(name: str) -> tuple[str, ...]:
    """All parts of the split GGUF that `name` is one of, in their order; a whole file is its own part."""
    match = SPLIT.fullmatch(name)
    if match is None or not 1 <= int(match["number"]) <= int(match["count"]) <= MAX_PARTS:
        return (name,)
    count, suffix = match["count"], name[-len(".gguf") :]
    return tuple(f"{match['stem']}-{number:05}-of-{count}{suffix}" for number in range(1, int(count) + 1))


def choose_variant(variants: Sequence[Variant], tag: str | None, where: str) -> tuple[Variant, str | None]:
    """The variant that `tag` (a quantization, Q4_K_M) means; without one by DEFAULTS. And what was decided unasked.

    Raises ModelNotFound where no variant fits, several do, or parts are missing.
    """
    note = None
    if tag is not None:
        found = _with_tag(variants, tag)
    else:
        found = _by_default(variants)
        if len(variants) > 1 and len(found) == 1:
            note = f"{where} has {len(variants)} GGUF models: taking {found[0].name}; another one: {_tags(variants)}"
    if not found:
        raise ModelNotFound(f"{where}: no GGUF file is {tag}: there is {_tags(variants)}")
    if len(found) > 1:
        files = _listed(variant.name for variant in found)
        raise ModelNotFound(f"{where}: {len(found)} GGUF models fit {tag or 'equally well'}: name one with --f: {files}")
    if found[0].missing:
        absent = f"{len(found[0].missing)} parts of {found[0].name} are missing ({found[0].missing[0]} ...)"
        raise ModelNotFound(f"{where}: {absent}: download it again, or take another one")
    return found[0], note


def _with_tag(variants: Sequence[Variant], tag: str) -> list[Variant]:
    wanted = tag.upper()
    exact = [variant for variant in variants if variant.label == wanted]
    word = re.compile(rf"(?<![A-Z0-9_]){re.escape(wanted)}(?![A-Z0-9_])")
    return exact or [variant for variant in variants if word.search(variant.name.upper())]


def _by_default(variants: Sequence[Variant]) -> list[Variant]:
    for label in DEFAULTS:
        for spelled in (label, f"UD-{label}"):
            if found := [variant for variant in variants if variant.label == spelled]:
                return found
    return list(variants[:1])


def _label(name: str) -> str | None:
    """The quantization that a file's name tells, else its folder's: both `x-Q4_K_M.gguf` and `Q4_K_M/x-00001-of-2.gguf`."""
    match = SPLIT.fullmatch(name)
    stem = match["stem"] if match else name[: -len(".gguf")]
    for part in reversed(PurePosixPath(stem).parts):
        if found := LABEL.findall(part.upper()):
            return str(found[-1])
    return None


def _tags(variants: Sequence[Variant]) -> str:
    return _listed(f":{variant.label}" if variant.label else f"--f {variant.name}" for variant in variants)


# ---- safetensors ------------------------------------------------------------------------------------------------------


def safetensors_files(names: Sequence[str], shards: Sequence[str] | None, where: str) -> tuple[str, ...]:
    """The files of a safetensors model: config.json first, weights, tokenizer, template. `shards`: what the index names.

    model.safetensors counts before an index, as everywhere. Raises ModelNotFound where there are none, or not all.
    """
    top = [name for name in names if "/" not in name]
    weights = [name for name in top if name.endswith(".safetensors")]
    if "config.json" not in top or not weights:
        raise ModelNotFound(f"{where}: {_why_no_model(names)}")
    if SINGLE in weights:
        weights = [SINGLE]
    elif shards is None:
        raise ModelNotFound(f"{where}: it has safetensors, but neither {SINGLE} nor {INDEX}: take another conversion")
    elif absent := sorted(set(shards) - set(weights)):
        raise ModelNotFound(f"{where}: its index names {_listed(absent)}, which it does not have: take another conversion")
    else:
        weights = sorted(set(shards))
    others = {name for name in top if name.endswith((".json", ".jinja")) and not name.endswith(".index.json")}
    others |= {name for name in names if name in COMPANIONS} | ({INDEX} if weights != [SINGLE] else set())
    return ("config.json", *weights, *sorted(others - {"config.json"}))


def _why_no_model(names: Sequence[str]) -> str:
    if any(name.endswith(".safetensors") for name in names):
        return "it has safetensors but no config.json beside them: it is no language model in transformers' layout"
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        return f"it has only {_listed(pickles)}: pickles are never loaded: look for a safetensors or GGUF conversion of it"
    return "it has neither safetensors nor GGUF files: check the id"


# ---- words ------------------------------------------------------------------------------------------------------------


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def _listed(names: Iterable[str]) -> str:
    every = sorted(set(names))
    more = f" and {len(every) - SHOWN} more" if len(every) > SHOWN else ""
    return ", ".join(every[:SHOWN]) + more
