"""How much a chat template may do: its time, the size of each value, and what it writes in all.

template_sandbox.py asks before every call, filter, operator, loop turn and output, so no single operation of C code that
lies between two questions can take long or fill the memory. Each function raises TooMuch or gives back what may be used.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from threading import local
from time import monotonic
from typing import Any

import jinja2

__all__ = [
    "FILTER_CHECKS",
    "METHOD_CHECKS",
    "Budget",
    "TooMuch",
    "bounded_list",
    "charge",
    "check_operands",
    "check_printf",
    "check_spec",
    "measure",
    "tick",
]

MAX_VALUE = 1 << 24                        # characters of one text; with one for each item, the size of one structure
MAX_ITEMS = 1 << 20
MAX_WRITTEN = 1 << 26                      # characters over all outputs, those inside macros and blocks too
MAX_BITS = 4096                            # of an integer
MAX_DIGITS = 4300                          # of a number given as text, as in Python itself
MAX_WIDTH = 10_000                         # of padding in a format

# printf: a * takes a width from the arguments. Neither may ask for more than four digits of padding.
_WIDE = re.compile(r"%[^a-zA-Z%]*?(?:\*|[0-9]{5,})")
_WIDE_SPEC = re.compile(r"[0-9]{5,}")


class TooMuch(jinja2.TemplateError):
    """The template would take too long or make too large a value."""


class _Current(local):
    """The render that goes on in this thread."""

    deadline = float("inf")
    deadline_s = 0.0
    written = 0


_current = _Current()


class Budget:
    """`with Budget(2.0):` bounds the render inside it, in this thread."""

    def __init__(self, deadline_s: float) -> None:
        self.deadline_s = deadline_s

    def __enter__(self) -> None:
        _current.deadline_s, _current.deadline, _current.written = self.deadline_s, monotonic() + self.deadline_s, 0

    def __exit__(self, *_: object) -> None:
        _current.deadline = float("inf")


def tick() -> None:
    """Stop the render if its time is over."""
    if monotonic() > _current.deadline:
        raise TooMuch(f"it takes longer than {_current.deadline_s:g} s")


def charge(characters: int) -> None:
    """Count what is written; text that passes through macros counts again."""
    _current.written += characters
    if _current.written > MAX_WRITTEN:
        raise TooMuch(f"it writes more than {MAX_WRITTEN:,} characters")


def fit(size: int) -> None:
    """A text or structure of this size may be made."""
    if size > MAX_VALUE:
        raise TooMuch(f"it makes a value of {size:,} characters, {MAX_VALUE:,} are allowed")


def measure(value: Any, per_level: int = 0) -> int:
    """The size of `value` written out: its characters, and one for each item, as often as it occurs.

    per_level is added for each item times its depth, as indented JSON does.
    """
    if type(value) is str:
        return len(value)
    total, visited, stack = 0, 0, [(value, 1)]
    while stack:
        item, depth = stack.pop()
        visited += 1
        if not visited & 0xFFF:
            tick()
        total += 1 + per_level * depth
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, Mapping):
            total += len(item)
            fit(total)
            stack.extend((each, depth + 1) for pair in item.items() for each in pair)
        elif isinstance(item, list | tuple):
            total += len(item)
            fit(total)
            stack.extend((each, depth + 1) for each in item)
    fit(total)
    return total


def bounded_list(items: Iterable[Any]) -> list[Any]:
    """`items` as a list; a generator is run under the clock."""
    if isinstance(items, list | tuple):
        return list(items)
    result = []
    for item in items:
        tick()
        result.append(item)
        if len(result) > MAX_ITEMS:
            raise TooMuch(f"it makes a list of more than {MAX_ITEMS:,} items")
    return result


def check_operands(operator: str, left: Any, right: Any) -> None:
    """Before `left operator right`, where the result may be larger than both."""
    tick()
    if operator == "%" and isinstance(left, str):
        check_printf(left, right)
    elif isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > MAX_BITS and abs(left) != 1:
            raise TooMuch(f"it makes a number of {bits:,} bits, {MAX_BITS:,} are allowed")
    elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
        _fit_sequence(left, len(left) + len(right))
    elif operator == "*":
        sequence, count = (right, left) if isinstance(left, int) else (left, right)
        if hasattr(sequence, "__len__") and isinstance(count, int):
            _fit_sequence(sequence, len(sequence) * max(count, 0))


def _fit_sequence(sequence: Any, size: int) -> None:
    if isinstance(sequence, str):
        fit(size)
    elif size > MAX_ITEMS:
        raise TooMuch(f"it makes a list of {size:,} items, {MAX_ITEMS:,} are allowed")


def check_printf(pattern: str, values: Any) -> None:
    """Before `pattern % values`."""
    if _WIDE.search(pattern):
        raise TooMuch(f"it pads a text to more than {MAX_WIDTH:,} characters, or to a width that is given beside it")
    fit(len(pattern) + pattern.count("%") * (MAX_WIDTH if re.search(r"%[^a-zA-Z%]*[0-9]", pattern) else 32))
    fit(len(pattern) + pattern.count("%") * measure(values))


def check_spec(spec: str) -> None:
    """A format specification such as `>20`."""
    if _WIDE_SPEC.search(spec):
        raise TooMuch(f"it pads a text to more than {MAX_WIDTH:,} characters")


def _replaced(text: Any, old: Any, new: Any, *_: Any, **__: Any) -> None:
    text, old, new = str(text), str(old), str(new)
    fit(len(text) + text.count(old) * len(new))


def _joined(separator: str, items: list[Any]) -> None:
    fit(measure(items) + len(separator) * len(items))


def _indented(text: Any, width: Any, *_: Any) -> None:
    added = len(width) if isinstance(width, str) else int(width)
    fit(len(str(text)) + (str(text).count("\n") + 1) * max(added, 0))


def _rounded(_: Any, precision: Any, *__: Any) -> None:
    if abs(int(precision)) > 400:
        raise TooMuch(f"it rounds to {precision} digits")


def _chunked(_: Any, count: Any, fill_with: Any) -> None:
    if int(count) > MAX_WIDTH or isinstance(fill_with, list | tuple | Mapping):
        raise TooMuch(f"it cuts a list into {count} or fills it with a list")


def _summed(items: list[Any], _: Any, start: Any) -> None:
    lengths = [len(item) for item in [start, *items] if hasattr(item, "__len__")]
    fit(sum(lengths) * len(lengths))       # sum() of lists copies what it has at every step


def _parsed(value: Any, *_: Any) -> None:
    if isinstance(value, str) and len(value) > MAX_DIGITS:
        raise TooMuch(f"it reads a number of {len(value):,} characters")


def _json(value: Any, _: Any, indent: Any, *__: Any) -> None:
    level = len(indent) if isinstance(indent, str) else int(indent or 0)
    measure(value, per_level=max(level, 0))


def _formatted(pattern: Any, *args: Any, **kwargs: Any) -> None:
    check_printf(str(pattern), kwargs or args)


Check = Callable[..., None]

# Filters that make more than they get; a check is given all arguments in the order of the filter's signature. The others
# give at most a small multiple of their input.
FILTER_CHECKS: dict[str, Check] = {
    "batch": _chunked,
    "center": lambda text, width: fit(int(width)),
    "format": _formatted,
    "indent": _indented,
    "int": _parsed,
    "join": lambda items, separator, _: _joined(str(separator), items),
    "replace": _replaced,
    "round": _rounded,
    "slice": _chunked,
    "sum": _summed,
    "tojson": _json,
}

# Methods of texts that make more than they get.
METHOD_CHECKS: dict[str, Check] = {
    "center": lambda text, width, *_: fit(int(width)),
    "expandtabs": lambda text, tabsize=8: fit(len(text) + text.count("\t") * max(int(tabsize), 0)),
    "join": lambda text, items: _joined(text, items),
    "ljust": lambda text, width, *_: fit(int(width)),
    "replace": _replaced,
    "rjust": lambda text, width, *_: fit(int(width)),
    "zfill": lambda text, width: fit(int(width)),
}
