"""A Grammar -> the text that llguidance compiles, with thinking before it where the model thinks. And bounds before that.

engine.text.grammars calls it on a worker thread, and asks thinking_in first. Nothing here compiles anything.
"""

import json
import re
from collections.abc import Callable
from enum import Enum, auto
from typing import Any

from engine.errors import InvalidRequest
from engine.text.grammar import Grammar
from engine.text.grammar_formats import drop_remarks
from engine.text.grammar_lark import MAX_RULES, check_schema, read_lark

__all__ = ["Thinking", "source_text", "thinking_in"]

MAX_SOURCE_BYTES = 128 * 1024
MAX_TEXTS = 10_000
MAX_ITEMS = 1000
# What makes a grammar Lark and not GBNF. llguidance's own any_to_lark looks with `^\s*`, which takes minutes for many empty
# lines, and all the time with the interpreter's lock: nobody else in the process would be served.
LARK = re.compile(r"^[ \t]*(?:%llguidance\b|start\s*:)", re.MULTILINE)
SPACE = r"[ \n\t\r]{0,64}"          # between the signs of JSON: some models would write spaces for ever
GAP = r"[ \n\t\r]{0,16}"            # between thinking and the answer


class Thinking(Enum):
    """Where an answer begins."""

    NONE = auto()       # with what must match: the model does not think, or the prompt has closed the thinking
    POSSIBLE = auto()   # with what must match, or with the marker that opens thinking
    BEGUN = auto()      # inside of thinking, which the prompt has opened


def thinking_in(turn: str, markers: tuple[str, str] | None) -> Thinking:
    """What the prompt's last words, those of the answer's own turn, say about thinking."""
    if markers is None:
        return Thinking.NONE
    opened, closed = turn.rfind(markers[0]), turn.rfind(markers[1])
    if opened == closed:                                       # neither is there
        return Thinking.POSSIBLE
    return Thinking.BEGUN if opened > closed else Thinking.NONE


def source_text(grammar: Grammar, thinking: Thinking, name_token: Callable[[str], str]) -> str:
    """llguidance's grammar, as JSON. name_token: Lark for a special token's text. Raises InvalidRequest."""
    try:
        size = len(grammar.source.encode())
    except UnicodeEncodeError:
        raise InvalidRequest("the grammar has half a surrogate pair: send whole characters", field="grammar") from None
    if size > MAX_SOURCE_BYTES:
        message = f"the grammar has {size:,} bytes, at most {MAX_SOURCE_BYTES:,} are allowed: shorten it"
        raise InvalidRequest(message, field="grammar")
    answer = _answer(grammar, name_token)
    if thinking is Thinking.NONE:
        return json.dumps({"grammars": [answer]})
    assert grammar.reasoning is not None
    opening, closing = map(name_token, grammar.reasoning)
    # A token that is no text ends a text by itself; a marker in letters has to be looked for.
    body = f"text {closing}" if closing.startswith("<[") else f"closed\nclosed[suffix={closing}]: /(.|\\n)*/"
    begin = "thinking" if thinking is Thinking.BEGUN else f"({opening} thinking)?"
    lark = f"start: {begin} @answer\nthinking: said GAP\nsaid: {body}\ntext: /(.|\\n)*/\nGAP: /{GAP}/"
    return json.dumps({"grammars": [{"lark_grammar": lark}, {"name": "answer", **answer}]})


def _answer(grammar: Grammar, name_token: Callable[[str], str]) -> dict[str, Any]:
    """One entry of llguidance's list of grammars."""
    source = grammar.source
    match grammar.kind:
        case "json_object":
            return {"json_schema": _with_options({"type": "object"})}
        case "json_schema":
            return {"json_schema": _with_options(_schema(source))}
        case "choice":
            return {"lark_grammar": _one_of(_texts(source))}
        case "regex":
            return {"lark_grammar": f"start: /{_in_slashes(source)}/"}
        case "lark":
            return {"lark_grammar": read_lark(source, name_token)}
        case "gbnf":
            return {"lark_grammar": read_lark(_from_gbnf(source), name_token)}
    raise InvalidRequest(f"{grammar.kind!r} is no kind of grammar: there are json_schema, json_object, regex, choice, lark "
                         "and gbnf", field="grammar")  # fmt: skip


def _load(source: str) -> object:
    def refuse(word: str) -> object:
        raise ValueError(f"{word} is no JSON")

    try:
        return json.loads(source, parse_constant=refuse)
    except ValueError as error:
        raise InvalidRequest(f"the grammar must be JSON: {error}", field="grammar") from None
    except RecursionError:
        raise InvalidRequest("the schema is nested too deeply: make it flatter", field="grammar") from None


def _schema(source: str) -> object:
    schema = _load(source)
    if not isinstance(schema, dict | bool):
        raise InvalidRequest(f"a schema is a JSON object, not {source[:40]}", field="grammar")
    check_schema(schema)
    drop_remarks(schema)
    return schema


def _with_options(schema: object) -> object:
    """A schema cannot set llguidance's options itself, such as one that ignores what it cannot keep."""
    if not isinstance(schema, dict):
        return schema
    return {**schema, "x-guidance": {"whitespace_pattern": SPACE, "lenient": False}}


def _texts(source: str) -> list[str]:
    texts = _load(source)
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise InvalidRequest("a choice is a JSON list of texts, at least one", field="grammar")
    if len(texts) > MAX_TEXTS:
        raise InvalidRequest(f"a choice of {len(texts):,} texts, at most {MAX_TEXTS:,} are allowed", field="grammar")
    return texts


def _one_of(texts: list[str]) -> str:
    """The Lark of a choice. Many texts are one word of the lexer: each would be an item of llguidance's parser, which takes
    2,000 at a place."""
    if len(texts) <= MAX_ITEMS:
        return "start: " + " | ".join(map(json.dumps, texts))
    start = "start: TEXT?" if "" in texts else "start: TEXT"
    return f"{start}\nTEXT: " + " | ".join(json.dumps(text) for text in texts if text)


def _in_slashes(regex: str) -> str:
    """The regex as Lark writes it: a slash and a line's end would end it. Digits are 0 to 9, as in a schema's patterns."""
    plain = {"/": "\\/", "\n": "\\n", "\r": "\\r", "\\\n": "\\n", "\\\r": "\\r", "\\d": "[0-9]"}
    return re.sub(r"\\.|[/\n\r]", lambda sign: plain.get(sign[0], sign[0]), regex, flags=re.DOTALL) or "(?:)"


def _from_gbnf(source: str) -> str:
    from llguidance.gbnf_to_lark import gbnf_to_lark  # lazily: it is optional

    if LARK.search(source):
        return source
    if (rules := source.count("::=")) > MAX_RULES:         # the converter's time is quadratic in their number
        message = f"the grammar has {rules:,} rules, at most {MAX_RULES} are allowed: shorten it"
        raise InvalidRequest(message, field="grammar")
    try:
        return gbnf_to_lark(source)
    except RecursionError:
        raise InvalidRequest("the grammar is nested too deeply: make it flatter", field="grammar") from None
    except Exception as error:                             # the converter raises plain Exceptions
        raise InvalidRequest(f"the grammar is no GBNF: {str(error)[:200]}", field="grammar") from None
