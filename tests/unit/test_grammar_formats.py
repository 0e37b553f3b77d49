"""Formats in a schema: those that llguidance keeps are kept, every other one is a remark and refuses nobody."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llguidance
import pytest
from pydantic import BaseModel, SecretBytes, SecretStr

from engine.errors import InvalidRequest
from engine.text.grammar import Grammar
from engine.text.grammar_formats import KEPT, drop_remarks
from engine.text.grammar_source import Thinking, source_text
from engine.text.grammars import Grammars
from engine.weights.checkpoint import Checkpoint

WORDS = (
    "path", "file-path", "directory-path", "password", "binary", "byte", "int32", "int64", "float", "double", "decimal",
    "base64url", "json-string", "color", "regex", "ipvanyaddress", "uri-reference", "iri", "idn-email", "unknown", "Date",
)  # fmt: skip


def refusal(schema: object) -> str:
    """llguidance's own word on a schema; empty if it takes it."""
    source = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema))
    return llguidance.LLMatcher.validate_grammar(source)


class Account(BaseModel):
    home: Path
    password: SecretStr
    key: SecretBytes
    data: bytes


@pytest.mark.parametrize("word", sorted(KEPT))
def test_the_formats_that_are_kept_are_llguidances_own(word: str) -> None:
    assert not refusal({"type": "string", "format": word})
    schema = {"type": "string", "format": word}
    assert not drop_remarks(schema)
    assert schema == {"type": "string", "format": word}


@pytest.mark.parametrize("word", WORDS)
def test_every_other_format_is_dropped(word: str) -> None:
    schema: Any = {"type": "object", "properties": {"a": {"anyOf": [{"type": "string", "format": word}, {"type": "null"}]}}}
    assert refusal(schema) or word == "unknown", "llguidance keeps it now: let KEPT have it"
    assert drop_remarks(schema)
    assert schema == {"type": "object", "properties": {"a": {"anyOf": [{"type": "string"}, {"type": "null"}]}}}
    assert not refusal(schema)


def test_properties_and_values_that_are_called_format_stay() -> None:
    schema: Any = {
        "type": "object",
        "properties": {
            "format": {"type": "string", "format": "path"},
            "enum": {"type": "string", "format": "path"},
            "kind": {"enum": [{"format": "path"}], "default": {"format": "path"}},
        },
        "const": {"format": "path"},
        "$defs": {"const": {"format": "path"}},
        "items": [{"not": {"format": "byte"}}],
    }
    assert drop_remarks(schema)
    assert schema["properties"]["format"] == schema["properties"]["enum"] == {"type": "string"}
    assert schema["properties"]["kind"] == {"enum": [{"format": "path"}], "default": {"format": "path"}}
    assert schema["const"] == {"format": "path"}
    assert schema["$defs"] == {"const": {}}
    assert schema["items"] == [{"not": {}}]
    assert not drop_remarks(schema)
    assert not drop_remarks(True)


def test_a_schema_in_lark_loses_them_too_and_keeps_its_words() -> None:
    named: Callable[[str], str] = str
    lark = 'start: "x" %json {"type": "string",  "format": "path"} "y"'
    [answer] = json.loads(source_text(Grammar("lark", lark), Thinking.NONE, named))["grammars"]
    assert answer["lark_grammar"] == 'start: "x" %json {"type": "string"} "y"'
    kept = lark.replace("path", "date")
    [answer] = json.loads(source_text(Grammar("lark", kept), Thinking.NONE, named))["grammars"]
    assert answer["lark_grammar"] == kept


@pytest.mark.anyio
async def test_pydantics_paths_and_secrets_compile(tiny_checkpoint: Callable[[], Checkpoint]) -> None:
    tokenizer = tiny_checkpoint().tokenizer
    grammars = Grammars(tokenizer, tokenizer.vocabulary_size, tokenizer.end_ids)
    [matcher] = await grammars.matchers(Grammar("json_schema", json.dumps(Account.model_json_schema())), (), 1)
    assert matcher is not None
    assert matcher.error is None
    source = json.dumps({"type": "string", "format": "date", "minLength": 20})
    with pytest.raises(InvalidRequest):                  # a format that is enforced still is
        await grammars.matchers(Grammar("json_schema", source), (), 1)
