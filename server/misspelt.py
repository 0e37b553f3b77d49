"""Fields that nobody knows but that look like one that a request has: refused with the right name, instead of ignored.

server.decoding calls it before a body is decoded. Other unknown fields are let through (server.unsupported says which are
not): clients send many that change no answer. Nothing here looks at a value.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from engine import InvalidRequest

__all__ = ["refuse_misspelt"]

# What clients are known to send, whatever it looks like: those of OpenRouter, Anthropic, Ollama, Open WebUI.
SENT = frozenset({"models", "speed", "context", "session"})
SHORTEST, SHORT, LONG = 4, 6, 10                         # letters
MAX_NAME = 64
MAX_LOOKED_AT = 32                                       # unknown fields of one request


def refuse_misspelt(request: Mapping[str, Any], known: Iterable[str], others: Iterable[str] = ()) -> None:
    """Raise InvalidRequest for a field that is none of `known` (which the request has) or `others`, and looks like one of
    `known`."""
    known = tuple(known)
    unknown = request.keys() - set(known) - set(others) - SENT
    for field in sorted(unknown)[:MAX_LOOKED_AT]:
        if len(field) <= MAX_NAME and (meant := _meant(field, known)) is not None:
            raise InvalidRequest(f"{field} is not a field of this request: did you mean {meant}?", field=field)


def _meant(field: str, known: Iterable[str]) -> str | None:
    """The name that is most like it, case and separators aside."""
    said = _letters(field)
    best, fewest = None, 3
    for name in known:
        letters = _letters(name)
        if letters == said:
            return name
        if abs(len(letters) - len(said)) <= 2 and (edits := _edits(said, letters)) < fewest and _likely(said, letters, edits):
            best, fewest = name, edits
    return best


def _likely(said: str, letters: str, edits: int) -> bool:
    """Of short words many are alike by accident: one of them may only miss a letter or have one too many."""
    shorter = min(len(said), len(letters))
    if shorter < SHORT:
        return shorter >= SHORTEST and edits == 1 and len(said) != len(letters)
    return edits <= (1 if shorter < LONG else 2)


def _letters(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _edits(one: str, other: str) -> int:
    """How many letters were left out, added, changed or swapped with the next one between two words (the distance of optimal
    string alignment)."""
    before, last = [0] * (len(other) + 1), list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        row = [i]
        for j, theirs in enumerate(other, 1):
            cost = min(row[j - 1] + 1, last[j] + 1, last[j - 1] + (letter != theirs))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == theirs:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
        before, last = last, row
    return last[-1]
