"""What a JSON schema's `format` may say to llguidance: which formats it keeps, and a schema without the others.

engine.text.grammar_source and engine.text.grammar_lark call it with a schema that they have just read. By JSON Schema's own
words a format that nobody knows is a remark: pydantic writes "path", "password" and "binary", OpenAPI "int64" and "double".
"""

from typing import Any

__all__ = ["KEPT", "drop_remarks"]

# Those of llguidance 1.9; it refuses a schema for any other. "unknown" is a word of its own and keeps nothing.
KEPT = frozenset(
    {"date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"}
)  # fmt: skip
# Under these keys names stand beside schemas, under those there are values and no schemas.
NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
VALUES = frozenset({"enum", "const", "default", "example", "examples"})


def drop_remarks(schema: object) -> bool:
    """Take every format that no answer is held to out of the schema, in place; whether there was one."""
    dropped = False
    stack: list[object] = [schema]
    while stack:
        match stack.pop():
            case dict() as fields:
                said = fields.get("format")
                if isinstance(said, str) and said not in KEPT:
                    del fields["format"]
                    dropped = True
                stack += _schemas_in(fields)
            case list() as items:
                stack += items
    return dropped


def _schemas_in(fields: dict[str, Any]) -> list[object]:
    found: list[object] = []
    for key, value in fields.items():
        if key in NAMED and isinstance(value, dict):
            found += value.values()
        elif key not in VALUES:
            found.append(value)
    return found
