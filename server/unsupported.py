"""Fields of requests that would change the answer and are not supported: refused by name, never accepted and ignored.

One table: field -> the values that mean "off". server.protocol checks it before it decodes. A field that stands neither here
nor in a request struct changes nothing in the answer (user, store, metadata, service_tier, ...) and is let through.
"""

from collections.abc import Mapping
from typing import Any

from engine import InvalidRequest

__all__ = ["refuse_unsupported"]

OFF = (None,)
NOTHING: tuple[Any, ...] = (None, [], {}, "", False)
NO_TOOLS = (None, "none", "auto")                         # without tools, auto is none

COMMON: dict[str, tuple[Any, ...]] = {
    # OpenAI's own
    "tools": (None, []),
    "tool_choice": NO_TOOLS,
    "functions": (None, []),
    "function_call": NO_TOOLS,
    "response_format": (None, {"type": "text"}),
    "modalities": (None, [], ["text"]),
    "audio": OFF,
    "web_search_options": OFF,
    "reasoning_effort": (None, "none"),
    "verbosity": (None, "medium"),
    # vLLM's and SGLang's
    "structured_outputs": NOTHING,
    "guided_json": NOTHING,
    "guided_regex": NOTHING,
    "guided_choice": NOTHING,
    "guided_grammar": NOTHING,
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
    "best_of": (None, 1),
    "add_special_tokens": (None, False),
}
COMPLETION: dict[str, tuple[Any, ...]] = {
    **COMMON,
    "suffix": (None, ""),
    "messages": OFF,
    "top_logprobs": OFF,
    "chat_template_kwargs": (None, {}),
    "add_special_tokens": (None, True),
}
CURES: dict[str, str] = {
    "thinking": 'send chat_template_kwargs {"enable_thinking": true} instead',
    "n_predict": "send max_tokens instead",
    "prompt": "send messages, or POST it to /v1/completions",
    "messages": "send a prompt, or POST them to /v1/chat/completions",
    "top_logprobs": "send logprobs with a number instead",
    "chat_template": "start the server with --chat-template FILE instead",
}


def refuse_unsupported(request: Mapping[str, Any], *, chat: bool) -> None:
    """Raise InvalidRequest(field) for the first field that asks for what is not there."""
    table = CHAT if chat else COMPLETION
    for field in request.keys() & table.keys():
        value, off = request[field], table[field]
        if not any(value == harmless and isinstance(value, bool) == isinstance(harmless, bool) for harmless in off):
            cure = CURES.get(field, "leave it out")
            raise InvalidRequest(f"{field} is not supported here: {cure}", field=field)
    best_of = None if chat else request.get("best_of")
    if best_of is not None and best_of != request.get("n", 1):
        raise InvalidRequest("best_of other than n is not supported: leave it out", field="best_of")
