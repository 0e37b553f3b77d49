"""Reading Lark before llguidance does: bounds on what it can cost, and names of special tokens turned into their ids.

engine.text.grammar_source is the caller. Sources come from clients: one pass, linear in their length, no backtracking.
"""

import json
import re
from collections.abc import Callable, Iterator
from decimal import Decimal, InvalidOperation
from math import lcm

from engine.errors import InvalidRequest
from engine.text.grammar_formats import drop_remarks

__all__ = ["MAX_RULES", "check_schema", "read_lark"]

MAX_RULES = 500          # a chain of some thousand rules overflows llguidance's stack
MAX_MULTIPLE = 10_000    # states of an automaton that counts remainders; 1,000,003 took 5 s and 330 MB
MAX_MULTIPLES = 100_000  # of all together

# A text, a comment, a regular expression, a token's name, a schema; each to the line's end where its own end is missing.
PARTS = re.compile(r'"(?:\\.|[^"\\\n])*"?|//[^\n]*|/(?:\\.|[^/\\\n])*/?|<[^<>\s]*>?|%json\b\s*')
TOKEN_IDS = re.compile(r"<\[[\^\d\-,*]*\]>")             # llguidance's own way to name tokens by id


def read_lark(source: str, name_token: Callable[[str], str]) -> str:
    """The source with each <name> replaced by name_token("<name>"). Raises InvalidRequest for what could take for ever."""
    out: list[str] = []
    rules, at = 0, 0
    while at < len(source):
        part = PARTS.search(source, at)
        plain = source[at : part.start()] if part else source[at:]
        if found := next((sign for sign in "&~" if sign in plain), None):
            raise InvalidRequest(
                f"a grammar must not use {found!r} (and, not) of regular expressions, which can take exponential time: "
                "write what is meant without it", field="grammar",
            )  # fmt: skip
        rules += plain.count(":")
        out.append(plain)
        if part is None:
            break
        text, at = part.group(), part.end()
        if text.startswith("%json"):
            written, at = _read_schema(source, at)
            text += written
        elif text.startswith("<") and text.endswith(">") and len(text) > 2 and not TOKEN_IDS.fullmatch(text):
            text = name_token(text)
        out.append(text)
    if rules > MAX_RULES:
        raise InvalidRequest(f"the grammar has {rules:,} rules, at most {MAX_RULES} are allowed: shorten it", field="grammar")
    return "".join(out)


def _read_schema(source: str, at: int) -> tuple[str, int]:
    """The schema that begins at `at`, and where it ends; one that is no JSON is left for llguidance to refuse."""
    try:
        schema, end = json.JSONDecoder().raw_decode(source, at)
    except ValueError:
        return "", at
    except RecursionError:
        raise InvalidRequest("a schema in the grammar is nested too deeply: make it flatter", field="grammar") from None
    check_schema(schema)
    return json.dumps(schema) if drop_remarks(schema) else source[at:end], end


def check_schema(schema: object) -> None:
    """Refuse multipleOf with large numbers: remainders are counted by an automaton with as many states."""
    together, total = 1, 0
    for number in _multiples(schema):
        together, total = lcm(together, number), total + number
        if together > MAX_MULTIPLE or total > MAX_MULTIPLES:
            raise InvalidRequest(
                f"multipleOf in a schema may have a least common multiple of at most {MAX_MULTIPLE:,}, {number:,} is too "
                "much: leave it out and check the number yourself", field="grammar",
            )  # fmt: skip


def _multiples(schema: object) -> Iterator[int]:
    """The significant digits of every multipleOf, as whole numbers."""
    stack = [schema]
    while stack:
        match stack.pop():
            case dict() as fields:
                value = fields.get("multipleOf")
                if isinstance(value, int | float) and not isinstance(value, bool) and value:
                    yield _digits(value)
                stack += fields.values()
            case list() as items:
                stack += items


def _digits(value: float) -> int:
    try:
        number = Decimal(repr(value))
    except (InvalidOperation, ValueError):                # thousands of digits
        return MAX_MULTIPLES
    if number.adjusted() > 20 or not number.is_finite():
        return MAX_MULTIPLES
    if number == number.to_integral_value():
        return abs(int(number))
    return int("".join(map(str, number.as_tuple().digits)))
