"""Whole responses, as structs that msgspec writes; chunks of streams are in server.sse.

The order of the fields is the order on the wire. None is written as null where the specification wants the key.
"""

from typing import Generic, TypeVar

from msgspec import UNSET, Struct, UnsetType

from engine import Usage

__all__ = [
    "AnthropicModelCard",
    "AnthropicModelList",
    "ChatChoice",
    "ChatLogprobs",
    "Completion",
    "CompletionChoice",
    "CompletionLogprobs",
    "FunctionBody",
    "ModelCard",
    "ModelList",
    "TokenLogprob",
    "ToolCallBody",
    "TopLogprob",
    "UsageBody",
    "usage_body",
]

C = TypeVar("C")


class _PromptDetails(Struct):
    cached_tokens: int


class _CompletionDetails(Struct):
    reasoning_tokens: int = 0


class UsageBody(Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: _PromptDetails
    completion_tokens_details: _CompletionDetails


def usage_body(usage: Usage, reasoning_tokens: int = 0) -> UsageBody:
    return UsageBody(
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.total_tokens,
        _PromptDetails(usage.cached_tokens),
        _CompletionDetails(reasoning_tokens),
    )


class TopLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    content: list[TokenLogprob]
    refusal: None = None


class CompletionLogprobs(Struct):
    """The first token of an echoed prompt has no logprob: nothing stands before it."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class FunctionBody(Struct):
    name: str
    arguments: str                                       # JSON text


class ToolCallBody(Struct, kw_only=True):
    id: str
    type: str = "function"
    function: FunctionBody


class ChatMessageBody(Struct, kw_only=True):
    """Thinking stands under both names that clients read: DeepSeek's reasoning_content, vLLM's reasoning."""

    role: str = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[ToolCallBody] | UnsetType = UNSET


class ChatChoice(Struct):
    index: int
    message: ChatMessageBody
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None


class CompletionChoice(Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None


class Completion(Struct, Generic[C]):
    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[C]
    usage: UsageBody


class ModelCard(Struct):
    id: str
    created: int
    max_model_len: int
    object: str = "model"
    owned_by: str = "rillet"


class ModelList(Struct):
    data: list[ModelCard]
    object: str = "list"


class AnthropicModelCard(Struct):
    """What Anthropic's clients, who send anthropic-version, read of a model. created_at: RFC 3339."""

    id: str
    display_name: str
    created_at: str
    type: str = "model"


class AnthropicModelList(Struct):
    data: list[AnthropicModelCard]
    first_id: str
    last_id: str
    has_more: bool = False
