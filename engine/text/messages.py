"""Message: one turn of a conversation, and what chat templates get of it: plain dicts with a text as content."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import InvalidRequest

__all__ = ["Message", "plain_messages"]

MAX_MESSAGES = 4096


@dataclass(frozen=True, slots=True)
class Message:
    """role is system, user, assistant or tool, or what the model's template knows; content is its text."""

    role: str
    content: str


def plain_messages(messages: Sequence[Message | Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates want them. Raises InvalidRequest naming the message that is wrong."""
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequest(f"{len(messages):,} messages, at most {MAX_MESSAGES:,} are allowed", field="messages")
    return [_plain(index, message) for index, message in enumerate(messages)]


def _plain(index: int, message: Message | Mapping[str, Any]) -> dict[str, Any]:
    field = f"messages[{index}]"
    if isinstance(message, Message):
        message = {"role": message.role, "content": message.content}
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        what = "" if isinstance(message, Mapping) else f", and is of type {type(message).__name__} (one prompt per call)"
        raise InvalidRequest(f"{field} must have a role and a content{what}", field=field)
    content = message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, (str, bytes)):
        content = "".join(_part(f"{field}.content[{at}]", part) for at, part in enumerate(content))
    elif content is not None and not isinstance(content, str):
        raise InvalidRequest(f"{field}.content must be a text or a list of text parts", field=field)
    return {**message, "content": content}


def _part(field: str, part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise InvalidRequest(f"{field} is of type {str(kind)[:40]!r}: only text parts are supported", field=field)
