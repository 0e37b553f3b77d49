"""Grammars that are wrong, or made to harm: each is its own request's InvalidRequest, soon, and the process lives on."""

import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import anyio
import numpy as np
import pytest

from engine.errors import InvalidRequest, Overloaded
from engine.text import grammars as grammars_module
from engine.text.grammar import Grammar
from engine.text.grammar_lark import read_lark
from engine.text.grammar_matcher import Compiled, GrammarMatcher, on_deep_stack, short_reason
from engine.text.grammar_source import Thinking, source_text
from engine.text.grammar_vocabulary import ForcedText, GrammarVocabulary
from engine.text.grammars import Grammars
from engine.text.tokenizer import Tokenizer
from engine.text.tokenizer_files import read_folder_tokenizer
from engine.weights.checkpoint import Checkpoint

pytestmark = pytest.mark.anyio
PATIENCE_S = 20


@pytest.fixture
def tokenizer(tiny_checkpoint: Callable[[], Checkpoint]) -> Tokenizer:
    return tiny_checkpoint().tokenizer


@pytest.fixture
async def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, tokenizer.vocabulary_size, tokenizer.end_ids)


def chain(link: str, end: str, size: int) -> str:
    """Definitions a0, a1, ... each of which leads to the next; as many as fit into `size` bytes."""
    parts, used = [], 0
    while used < size - 200:
        parts.append(f'"a{len(parts)}":' + link.replace("NEXT", f'{{"$ref":"#/$defs/a{len(parts) + 1}"}}'))
        used += len(parts[-1]) + 1
    return '{"$ref":"#/$defs/a0","$defs":{' + ",".join([*parts, f'"a{len(parts)}":{end}']) + "}}"


def nested(depth: int) -> str:
    return '{"type":"object","properties":{"a":' * depth + "{}" + "}}" * depth


LARGE = 100_000


def schema(value: object) -> Grammar:
    return Grammar("json_schema", json.dumps(value))


def rules(count: int, rule: str, end: str = '"a"') -> Grammar:
    """Lark: rules of which each leads to the next."""
    lines = [rule.replace("NEXT", f"R{i + 1}").replace("THIS", f"R{i}").replace("NUMBER", str(i)) for i in range(count)]
    return Grammar("lark", "\n".join(["start: R0", *lines, f"R{count}: {end}"]))


PRODUCT = {"allOf": [{"anyOf": [{"properties": {f"p{i}_{j}": {"const": 1}}} for j in range(10)]} for i in range(10)]}
BAD: dict[str, Grammar] = {
    "not JSON": Grammar("json_schema", "{"),
    "NaN": Grammar("json_schema", '{"const": NaN}'),
    "a list as schema": schema([1]),
    "no value can match": schema(False),
    "unknown type": schema({"type": "strin"}),
    "a feature that is not there": schema({"not": {"type": "string"}}),
    "asking to ignore it": schema({"not": {"type": "string"}, "x-guidance": {"lenient": True}}),
    "ambiguous oneOf": schema({"oneOf": [{"type": "string"}, {"type": "string", "pattern": "a"}]}),
    "a reference to itself": schema({"$ref": "#"}),
    "references in a circle": schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#"}}}),
    "a missing reference": schema({"$ref": "#/$defs/none"}),
    "nested a thousand deep": Grammar("json_schema", nested(1000)),
    "brackets 50,000 deep": Grammar("json_schema", "[" * 50_000),
    "a bad pattern": schema({"type": "string", "pattern": "(a"}),
    "patterns that exclude each other": schema({"type": "string", "allOf": [{"pattern": "^a$"}, {"pattern": "^b$"}]}),
    "remainders": schema({"type": "integer", "multipleOf": 1000003}),
    "remainders together": schema({"type": "integer", "allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}),
    "many remainders": schema({"prefixItems": [{"type": "integer", "multipleOf": 9973, "minimum": i} for i in range(100)]}),
    "remainders of thousands of digits": Grammar("json_schema", '{"multipleOf": 1' + "0" * 4000 + "1}"),
    "too large": schema({"enum": [f"value {i}" for i in range(20_000)]}),
    "a product of choices": schema(PRODUCT),
    "half a character": Grammar("regex", "\ud83d"),
    "bad regex": Grammar("regex", "(a"),
    "lookahead": Grammar("regex", "(?=a)b"),
    "parentheses": Grammar("regex", "(" * 50_000 + "a" + ")" * 50_000),
    "nothing matches": Grammar("regex", "[^\\x00-\\x{10ffff}]"),
    "no list": Grammar("choice", '"yes"'),
    "an empty list": Grammar("choice", "[]"),
    "numbers": Grammar("choice", "[1, 2]"),
    "a list too long": Grammar("choice", json.dumps([str(i) for i in range(10_001)])),
    "no start": Grammar("lark", 'x: "a"'),
    "no end": Grammar("lark", "start: start"),
    "unknown rule": Grammar("lark", "start: x"),
    "a NUL": Grammar("lark", 'start: "\0"'),
    "deep": Grammar("lark", "start: " + "(" * 50_000 + '"a"' + ")" * 50_000),
    "and": Grammar("lark", "start: A\nA: " + " & ".join(f"/(.|\\n)*a.{{{i}}}/" for i in range(20))),
    "not": Grammar("lark", "start: A\nA: ~/a*/"),
    "a chain of rules": rules(5000, "THIS: NEXT"),
    "remainders inside": Grammar("lark", 'start: %json {"type": "integer", "multipleOf": 1000003}'),
    "brackets inside": Grammar("lark", "start: %json " + '{"a":' * 20_000),
    "a range of tokens": Grammar("lark", "start: <[0-99999999]>"),
    "no GBNF": Grammar("gbnf", "roo ::= x"),
    "no root": Grammar("gbnf", 'a ::= "x"'),
    "nested GBNF": Grammar("gbnf", "root ::= " + "(" * 50_000 + '"a"' + ")" * 50_000),
    "no kind": Grammar("xml", "<a/>"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", BAD)
async def test_a_bad_grammar_is_an_invalid_request(grammars: Grammars, name: str) -> None:
    with anyio.fail_after(PATIENCE_S), pytest.raises(InvalidRequest) as refused:
        await grammars.matchers(BAD[name], [1, 2], 1)
    assert refused.value.field == "grammar"
    message = str(refused.value)
    assert 10 < len(message) < 330
    assert "\n" not in message


GOOD: dict[str, Grammar] = {
    "a tree": schema({"type": "array", "items": {"$ref": "#"}}),
    "an object without end": schema({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}),
    "a chain of references": Grammar("json_schema", chain("NEXT", '{"type": "string"}', LARGE)),
    "a chain of allOf": Grammar("json_schema", chain('{"allOf":[{"allOf":[{"allOf":[NEXT]}]}]}', "{}", LARGE)),
    "a chain of objects": Grammar("json_schema", chain('{"type":"object","properties":{"b":NEXT}}', "{}", LARGE // 2)),
    "doubling": Grammar("json_schema", chain('{"anyOf":[NEXT,NEXT]}', '{"type": "string"}', 3000)),
    "a wide choice": schema({"enum": [f"v{i}" for i in range(8000)]}),
    "a wide object": schema({"properties": {f"p{i}": {"type": "string"} for i in range(400)}}),
    "a long string": schema({"type": "string", "minLength": 10**6, "maxLength": 10**9}),
    "a long constant": schema({"const": "the world " * 10_000}),
    "a long list": schema({"type": "array", "minItems": 10**9, "items": {"type": "integer"}}),
    "remainders": schema({"type": "integer", "multipleOf": 9973, "minimum": 5, "maximum": 999999999}),
    "an exponential pattern": schema({"type": "string", "pattern": "^(.*a.{50}){50}$"}),
    "an exponential regex": Grammar("regex", "(a|b|ab)*c.{30}d|(.*a.{20})"),
    "repeated repeats": Grammar("regex", "((((a{1,1000}){1,1000}){1,1000}){1,1000}){1,1000}"),
    "unicode": Grammar("regex", r"(\p{L}{1,100}\p{N}?){1,100}\p{L}"),
    "a long regex": Grammar("regex", "a" * 100_000),
    "ambiguity": Grammar("lark", 'start: s\ns: s s | s s s | "a" |'),
    "many repeats": Grammar("lark", 'start: ((("a" | b){1,10000}){1,10000}){1,10000}\nb: "c"'),
    "many expressions": rules(150, "THIS: (/.*a.{NUMBER}b/ | NEXT)*"),
    "nested repeats": rules(450, 'THIS:(NEXT"x"){0,9}'),
    "doubled rules": rules(450, 'THIS:NEXT|"x"NEXT'),
}


@pytest.mark.parametrize("name", GOOD)
async def test_a_grammar_made_to_be_slow_gives_masks_soon(grammars: Grammars, tokenizer: Tokenizer, name: str) -> None:
    """Compiled, and walked for 60 tokens as the device thread would; a limit may end it, with words."""
    with anyio.fail_after(PATIENCE_S):
        (matcher,) = await grammars.matchers(GOOD[name], [1, 2], 1)
    assert isinstance(matcher, GrammarMatcher)
    draw, mask, began = np.random.default_rng(0), np.zeros((1, matcher.words), np.uint32), time.monotonic()
    for _ in range(60):
        GrammarMatcher.fill([matcher], mask)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        if len(allowed) == 0:
            assert matcher.error
            assert len(matcher.error) <= 240
            break
        assert allowed.max() < tokenizer.vocabulary_size
        matcher.consume(int(draw.choice(allowed)))
        if matcher.stopped:
            break
    assert time.monotonic() - began < PATIENCE_S


async def test_a_reference_to_another_machine_is_refused_and_nothing_is_fetched(grammars: Grammars) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        with pytest.raises(InvalidRequest):
            await grammars.matchers(Grammar("json_schema", json.dumps({"$ref": f"http://127.0.0.1:{port}/x.json"})), [1], 1)
        with pytest.raises(TimeoutError):
            server.accept()


async def test_a_grammar_that_takes_too_long_is_given_up_and_two_such_make_others_wait(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()

    def slow(text: str, vocabulary: GrammarVocabulary) -> Compiled:
        assert release.wait(PATIENCE_S)
        return Compiled(text, vocabulary)

    await grammars.matchers(Grammar("choice", '["yes"]'), [1], 1)
    monkeypatch.setattr(grammars_module, "Compiled", slow)
    monkeypatch.setattr(grammars_module, "PATIENCE_S", 0.01)
    for text in ("a", "b"):
        with pytest.raises(InvalidRequest, match="took more than"):
            await grammars.matchers(Grammar("regex", text), [1], 1)
    with pytest.raises(Overloaded):
        await grammars.matchers(Grammar("regex", "c"), [1], 1)
    assert len(await grammars.matchers(Grammar("choice", '["yes"]'), [1], 2)) == 2         # what is known needs no wait
    release.set()
    with anyio.fail_after(PATIENCE_S):
        for thread in grammars._stuck:
            await anyio.to_thread.run_sync(thread.join)
    monkeypatch.undo()
    assert await grammars.matchers(Grammar("regex", "c"), [1], 1)


async def test_what_was_compiled_is_kept_within_bounds(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr(grammars_module, "Compiled", lambda text, vocabulary: made.append(text) or Compiled(text, vocabulary))
    same = Grammar("regex", "[a-z]{4}")
    for _ in range(3):
        await grammars.matchers(same, [1], 1)
    assert len(made) == 1
    for number in range(grammars_module.MAX_KEPT + 20):
        await grammars.matchers(Grammar("regex", f"x{number}"), [1], 1)
        await grammars.matchers(same, [1], 1)                                            # used often: it stays
    assert len(made) == 1 + grammars_module.MAX_KEPT + 20
    assert len(grammars._kept) == grammars_module.MAX_KEPT
    monkeypatch.setattr(grammars_module, "MAX_KEPT_BYTES", 1 << 20)
    await grammars.matchers(Grammar("regex", "y"), [1], 1)
    assert sum(kept.bytes for kept in grammars._kept.values()) <= 1 << 20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.full
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
async def test_ten_thousand_schemas_take_no_more_memory_than_two_thousand(grammars: Grammars) -> None:
    async def ask(numbers: range) -> None:
        for number in numbers:
            properties = {f"p{number}_{i}": {"type": "string", "maxLength": number % 50} for i in range(12)}
            await grammars.matchers(Grammar("json_schema", json.dumps({"type": "object", "properties": properties})), [1], 2)

    await ask(range(2000))
    before = resident_bytes()
    await ask(range(2000, 10_000))
    assert resident_bytes() - before < 32 << 20


# ---- parts -----------------------------------------------------------------------------------------------------------------


def test_names_of_tokens_are_found_between_texts_comments_and_expressions() -> None:
    source = 'start: <a> "<b>" /<c>\\/<d>/ // <e>\n | <[5-7]> %json {"const": "<f>"} <g>'
    assert read_lark(source, lambda name: name.upper()) == source.replace("<a>", "<A>").replace("<g>", "<G>")


@pytest.mark.parametrize("sign", ['"', "/", "<", "\\", '\\"', "//", "%json ", "<<", '"\\'])
def test_reading_lark_takes_time_in_proportion_to_its_length(sign: str) -> None:
    began = time.monotonic()
    read_lark(sign * (LARGE // len(sign)), str)
    assert time.monotonic() - began < 2


def test_the_text_of_a_special_token_is_never_tokenized_as_that_token(tokenizer: Tokenizer) -> None:
    forced = ForcedText(tokenizer, tokenizer.vocabulary_size, tokenizer.special_ids, 2)
    ids = forced(b"hello<|im_end|>")
    assert tokenizer.special_ids.isdisjoint(ids)
    assert b"".join(tokenizer.pieces[token] for token in ids) == b"hello<|im_end|>"
    assert forced(b"hello") == tokenizer.encode("hello", add_special=False)


@pytest.mark.parametrize("name", ["bpe", "unigram"])
async def test_a_sentencepiece_vocabulary_writes_forced_texts_and_json(tmp_path: Path, name: str) -> None:
    """Its encoding puts a space before a text, which would be no part of the answer."""
    model = Path(__file__).parent.parent / "golden" / "tokenizers" / f"{name}.model"
    (tmp_path / "tokenizer.model").write_bytes(model.read_bytes())
    tokenizer = read_folder_tokenizer(tmp_path, 2000, frozenset({2}))
    forced = ForcedText(tokenizer, tokenizer.vocabulary_size, tokenizer.special_ids, 2)
    for text in ("hello", " hello world", "{", '"name": "x"', "  two", "ü🎉", "\n", "</s>", "a</s>b"):
        assert b"".join(tokenizer.pieces[token] for token in forced(text.encode())) == text.encode()
        assert tokenizer.special_ids.isdisjoint(forced(text.encode()))
    grammar = schema({"type": "object", "properties": {"name": {"enum": ["hello world", "ü"]}, "n": {"const": None}},
                      "required": ["name", "n"], "additionalProperties": False})  # fmt: skip
    for seed in range(10):
        (matcher,) = await Grammars(tokenizer, tokenizer.vocabulary_size, frozenset({2})).matchers(grammar, [1], 1)
        assert isinstance(matcher, GrammarMatcher)
        draw, mask, written = np.random.default_rng(seed), np.zeros((1, matcher.words), np.uint32), b""
        while not matcher.stopped:
            GrammarMatcher.fill([matcher], mask)
            allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
            token = int(draw.choice(allowed))
            matcher.consume(token)
            written += tokenizer.pieces[token]
        assert json.loads(written)["name"] in ("hello world", "ü")


def test_a_long_forced_text_is_tokenized_once(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text, **keywords: calls.append(text) or encode(text, **keywords))
    forced = ForcedText(tokenizer, tokenizer.vocabulary_size, tokenizer.special_ids, 2)
    text = b"hello the world " * 500
    ids = forced(text)
    at = 0
    for number, token in enumerate(ids[:200]):
        assert forced(text[at:]) == ids[number:]
        at += len(tokenizer.pieces[token])
    assert len(calls) == 1
    assert forced(b"x" + text[-64:]) != ids
    assert b"".join(tokenizer.pieces[token] for token in forced(b"x" + text[-64:])) == b"x" + text[-64:]


async def test_every_row_of_the_model_without_a_token_is_off(tokenizer: Tokenizer) -> None:
    """A model with more rows than its vocabulary, and one with fewer."""
    for rows in (tokenizer.vocabulary_size + 45, tokenizer.vocabulary_size - 2):
        (matcher,) = await Grammars(tokenizer, rows, tokenizer.end_ids).matchers(Grammar("regex", "(?s:.*)"), [1], 1)
        assert isinstance(matcher, GrammarMatcher)
        mask = np.full((1, -(-rows // 32)), 0xFFFFFFFF, np.uint32)
        GrammarMatcher.fill([matcher], mask)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        assert allowed.max() < min(rows, tokenizer.vocabulary_size)
        assert len(allowed) > 100


async def test_a_model_without_an_end_token_refuses_grammars(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="no token that ends"):
        await Grammars(tokenizer, tokenizer.vocabulary_size, frozenset()).matchers(Grammar("regex", "a"), [1], 1)


def test_errors_are_cut_short() -> None:
    assert short_reason("one\n  two\n<state>\nsecrets") == "one two"
    assert len(short_reason("x" * 1000)) == 240


def test_what_a_thread_with_a_deep_stack_raises_its_caller_gets() -> None:
    with pytest.raises(ZeroDivisionError):
        on_deep_stack(lambda: 1 // 0)
    assert on_deep_stack(lambda: 5) == 5


def test_the_shape_of_what_is_compiled() -> None:
    text = source_text(Grammar("choice", '["a"]', ("<t>", "</t>")), Thinking.BEGUN, json.dumps)
    first, second = json.loads(text)["grammars"]
    assert first["lark_grammar"].startswith("start: thinking @answer")
    assert second == {"name": "answer", "lark_grammar": 'start: "a"'}
