"""Fields of requests that would change the answer and are not supported: refused by name, never accepted and ignored.

One table: field -> the values that mean "off". server.decoding checks it before it decodes. A field that stands neither here
nor in a request struct changes nothing in the answer (user, store, metadata, service_tier, ...) and is let through, unless it
is one of theirs misspelt: server.misspelt.
"""

from collections.abc import Mapping
from typing import Any

from engine import InvalidRequest

__all__ = ["CHAT", "COMPLETION", "refuse_unsupported"]

OFF = (None,)
NO_CURES: Mapping[str, str] = {}
NOTHING: tuple[Any, ...] = (None, [], {}, "", False)

COMMON: dict[str, tuple[Any, ...]] = {
    # OpenAI's own
    "functions": (None, []),
    "function_call": (None, "none", "auto"),              # without functions, auto is none
    "modalities": (None, [], ["text"]),
    "audio": OFF,
    "web_search_options": OFF,
    "verbosity": (None, "medium"),
    # vLLM's and SGLang's
    "guided_whitespace_pattern": OFF,
    "structural_tag": NOTHING,
    "json_schema": NOTHING,
    "regex": NOTHING,
    "ebnf": NOTHING,
    "grammar": NOTHING,
    "use_beam_search": (None, False),
    "length_penalty": (None, 1),
    "min_tokens": (None, 0),
    "bad_words": (None, []),
    "allowed_token_ids": OFF,
    "include_stop_str_in_output": (None, False),
    "truncate_prompt_tokens": OFF,
    "prompt_logprobs": OFF,
    "prompt_embeds": OFF,
    "logits_processors": (None, []),
    "return_tokens_as_token_ids": (None, False),
    "return_token_ids": (None, False),
    "thinking_token_budget": OFF,
    "repetition_detection": OFF,
    "kv_transfer_params": OFF,
    "priority": (None, 0),
    "chat_template": OFF,
    "documents": (None, []),
    "add_generation_prompt": (None, True),
    "continue_final_message": (None, False),
    "thinking": OFF,
    "separate_reasoning": (None, True),
    "stream_reasoning": (None, True),
    # llama.cpp's
    "n_predict": OFF,
    "typical_p": (None, 1),
    "mirostat": (None, 0),
    "xtc_probability": (None, 0),
    "dry_multiplier": (None, 0),
    "top_n_sigma": (None, -1),
    "dynatemp_range": (None, 0),
    "lora": NOTHING,
}
CHAT: dict[str, tuple[Any, ...]] = {
    **COMMON,
    "echo": (None, False),
    "prompt": OFF,
    "system": (None, ""),
    "best_of": (None, 1),
    "add_special_tokens": (None, False),
}
COMPLETION: dict[str, tuple[Any, ...]] = {
    **COMMON,
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "reasoning_effort": (None, "none"),
    "messages": OFF,
    "top_logprobs": OFF,
    "chat_template_kwargs": (None, {}),
    "add_special_tokens": (None, True),
}
CURES: dict[str, str] = {
    "thinking": 'send chat_template_kwargs {"enable_thinking": true} instead',
    "n_predict": "send max_tokens instead",
    "functions": "it is deprecated, send tools instead",
    "function_call": "it is deprecated, send tool_choice instead",
    "json_schema": "send response_format instead",
    "regex": 'send structured_outputs {"regex": ...} instead',
    "ebnf": 'send structured_outputs {"grammar": ...} instead',
    "grammar": 'send structured_outputs {"grammar": ...} instead',
    "prompt_logprobs": "send echo and logprobs to /v1/completions instead",
    "separate_reasoning": "read reasoning_content before content",
    "tools": "POST messages to /v1/chat/completions",
    "tool_choice": "POST messages to /v1/chat/completions",
    "reasoning_effort": "POST messages to /v1/chat/completions",
    "prompt": "send messages, or POST it to /v1/completions",
    "system": "send it as the first of the messages, with the role system",
    "messages": "send a prompt, or POST them to /v1/chat/completions",
    "top_logprobs": "send logprobs with a number instead",
    "chat_template": "start the server with --chat-template FILE instead",
}


def refuse_unsupported(
    request: Mapping[str, Any], table: Mapping[str, tuple[Any, ...]], cures: Mapping[str, str] = NO_CURES
) -> None:  # fmt: skip
    """Raise InvalidRequest(field) for the first field that asks for what is not there. cures: a request's own ones."""
    for field in request.keys() & table.keys():
        value, off = request[field], table[field]
        if not any(value == harmless and isinstance(value, bool) == isinstance(harmless, bool) for harmless in off):
            cure = cures.get(field) or CURES.get(field, "leave it out")
            raise InvalidRequest(f"{field} is not supported here: {cure}", field=field)
    best_of = request.get("best_of")
    if table is COMPLETION and best_of is not None and best_of != request.get("n", 1):
        raise InvalidRequest("best_of other than n is not supported: leave it out", field="best_of")
