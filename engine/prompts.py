"""From what a caller gives (a text, token ids, messages) to token ids that fit. Slow work runs on worker threads.

The engine's facade is the only caller; refusals are InvalidRequest and ContextTooLong, before anything is admitted.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import anyio.to_thread
import numpy as np

from engine.errors import ContextTooLong, InvalidRequest
from engine.text.infill import find_infill
from engine.text.messages import Message, plain_messages
from engine.text.template import ChatTemplate
from engine.weights.checkpoint import Checkpoint

__all__ = ["Prompt", "PromptReader"]

Prompt = str | Sequence[int] | Sequence[Message | Mapping[str, Any]]
"""A text (used as it is), token ids, or messages (put through the chat template)."""
SHORT_TEXT = 2048                                        # characters that are tokenized at once, without a worker thread


class PromptReader:
    """Reads prompts for one model, served with `context_length`; `template` is None if it has no chat template.

    bounded_by_cache: whether it is the KV cache that makes the context length so short.
    """

    def __init__(
        self, checkpoint: Checkpoint, template: ChatTemplate | None, context_length: int, *, bounded_by_cache: bool = False
    ) -> None:
        self.context_length = context_length
        self._bounded_by_cache = bounded_by_cache
        self._spec = checkpoint.spec
        self._tokenizer = checkpoint.tokenizer
        self._template = template
        self._longest_piece = max(1, *map(len, checkpoint.tokenizer.pieces))

    async def tokens(
        self, prompt: Prompt, tools: list[dict[str, Any]] | None = None, arguments: Mapping[str, Any] | None = None,
        *, add_special: bool = True,
    ) -> tuple[int, ...]:  # fmt: skip
        """The token ids to run. tools and arguments reach the chat template; add_special is about texts."""
        if isinstance(prompt, str):
            encode = partial(self._tokenizer.encode, prompt, add_special=add_special)
            if len(prompt) <= SHORT_TEXT:
                return tuple(encode())
            self._check_length(prompt)
            return tuple(await anyio.to_thread.run_sync(encode))
        _check_kind(prompt)
        if len(prompt) == 0:
            raise InvalidRequest("the prompt is empty: give a text, token ids or messages", field="prompt")
        if len(prompt) > self.context_length and isinstance(prompt[0], (int, np.integer)):
            raise self.too_long(f"{len(prompt):,}")      # before the work of looking at each
        if all(isinstance(token, (int, np.integer)) and not isinstance(token, bool) for token in prompt):
            return self._checked_ids(prompt)  # type: ignore[arg-type]
        plain = plain_messages(prompt)  # type: ignore[arg-type]

        def render() -> tuple[int, ...]:
            text = self._render(plain, tools, arguments or {}, True)
            self._check_length(text)
            return tuple(self._tokenizer.encode(text, add_special=False))

        return await anyio.to_thread.run_sync(render)

    async def render(
        self, messages: Sequence[Message | Mapping[str, Any]], tools: list[dict[str, Any]] | None,
        arguments: Mapping[str, Any], add_generation_prompt: bool,
    ) -> str:  # fmt: skip
        """The text that the chat template makes of messages."""
        plain = plain_messages(messages)
        return await anyio.to_thread.run_sync(lambda: self._render(plain, tools, arguments, add_generation_prompt))

    async def infill(self, prefix: str, suffix: str) -> list[int]:
        """Token ids that ask for what stands between the two."""
        self._check_length(prefix + suffix)

        def encode() -> list[int]:
            infill = find_infill(self._tokenizer.pieces)
            if infill is None:
                message = "this model's vocabulary has no tokens for filling in: leave suffix out"
                raise InvalidRequest(message, field="suffix")
            return infill.tokens(self._tokenizer, prefix, suffix)

        return await anyio.to_thread.run_sync(encode)

    def too_long(self, tokens: str) -> ContextTooLong:
        """The refusal of a prompt of `tokens` tokens, in words."""
        limit, most = self.context_length, self._spec.context_length
        cure = "shorten it"
        if self._bounded_by_cache:
            cure += ", or give the KV cache more memory (--kv-bytes, or --kv-fraction and fewer --max-num-seqs)"
        elif limit < most:
            cure += f", or start with --max-model-len {most} (in Python max_model_len={most})"
        return ContextTooLong(f"the prompt has {tokens} tokens, the context length is {limit:,}: {cure}", field="prompt")

    def _checked_ids(self, prompt: Sequence[int]) -> tuple[int, ...]:
        vocabulary = self._spec.vocabulary_size
        tokens = tuple(int(token) for token in prompt)
        wrong = next((token for token in tokens if not 0 <= token < vocabulary), None)
        if wrong is not None:
            raise InvalidRequest(f"token id {wrong} is not in the vocabulary of {vocabulary}", field="prompt")
        return tokens

    def _check_length(self, text: str) -> None:
        """Refuse a text that cannot fit before the work of tokenizing it: no token is longer than the longest piece."""
        least = len(text) // self._longest_piece
        if least > self.context_length:
            raise self.too_long(f"at least {least:,}")

    def _render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, arguments: Mapping[str, Any],
        add_generation_prompt: bool,
    ) -> str:  # fmt: skip
        if self._template is None:
            raise InvalidRequest(
                "this model has no chat template: send a plain prompt, or start with --chat-template FILE", field="messages"
            )
        return self._template.render(messages, add_generation_prompt=add_generation_prompt, tools=tools, **arguments)


def _check_kind(prompt: object) -> None:
    if isinstance(prompt, (bytes, bytearray)) or not isinstance(prompt, (Sequence, np.ndarray)):
        kind = type(prompt).__name__
        raise InvalidRequest(f"a prompt is a text, token ids or messages, not of type {kind}", field="prompt")
    if isinstance(prompt, np.ndarray) and prompt.ndim != 1:
        raise InvalidRequest(f"token ids are a list, not an array of {prompt.ndim} dimensions", field="prompt")
