"""Requests of /v1/chat/completions and /v1/completions as structs, and what the engine gets of them.

server.decoding fills them, the routes read them. Whatever is wrong becomes InvalidRequest with the field's name. Numbers are
bounded by SamplingParams, sizes here; it never touches the engine.
"""

from typing import Annotated, Any

from msgspec import Meta, Struct

from engine import InvalidRequest, SamplingParams

__all__ = ["ChatMessage", "ChatRequest", "CompletionRequest", "StreamOptions", "TextPart"]

MAX_MESSAGES = 4096
MAX_PARTS = 1024
MAX_PROMPTS = 256
MAX_NAME = 1024
MAX_TOP_LOGPROBS = 20
MAX_TEMPLATE_ARGUMENTS = 16
COMPLETION_TOKENS = 16                                    # OpenAI's default for /v1/completions
ROLES = {"developer": "system", "system": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
RESERVED = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"}     # of templates
    | {"chat_template", "deadline_s", "self"}                                                 # of the call
)

Name = Annotated[str, Meta(max_length=MAX_NAME)]
Scalar = bool | int | float | str | None


class StreamOptions(Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class TextPart(Struct):
    """One part of a content; only texts are understood, the others are refused by their place."""

    type: str
    text: str | None = None


class ChatMessage(Struct):
    role: str
    content: str | Annotated[list[TextPart], Meta(max_length=MAX_PARTS)] | None = None
    name: Name | None = None
    tool_call_id: Name | None = None
    tool_calls: list[Any] | None = None
    function_call: Any = None
    audio: Any = None

    def plain(self, at: int) -> dict[str, str]:
        """What the chat template gets."""
        place = f"messages[{at}]"
        role = ROLES.get(self.role)
        if role is None:
            known = ", ".join(ROLES)
            raise InvalidRequest(f"{place}.role is {self.role[:40]!r}: choose one of {known}", field=f"{place}.role")
        for name in ("tool_calls", "function_call", "audio"):
            if getattr(self, name):
                raise InvalidRequest(f"{place}.{name} is not supported here: leave it out", field=f"{place}.{name}")
        message = {"role": role, "content": self._text(f"{place}.content")}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message

    def _text(self, place: str) -> str:
        match self.content:
            case str(text):
                return text
            case None if self.role == "assistant":
                return ""
            case None:
                raise InvalidRequest(f"{place} is missing: send a text or a list of text parts", field=place)
            case parts:
                for at, part in enumerate(parts):
                    if part.type != "text" or part.text is None:
                        field = f"{place}[{at}]"
                        raise InvalidRequest(
                            f"{field} is of type {part.type[:40]!r}: only text parts are supported", field=field
                        )
                return "".join(part.text or "" for part in parts)


class _Request(Struct, kw_only=True):
    """What both requests have. None is "not said" everywhere, as OpenAI's clients send it."""

    model: Name | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    max_tokens: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    session_id: str | None = None
    cache_salt: str | None = None

    @property
    def wants_usage(self) -> bool:
        """Whether the stream ends with a chunk of usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def choices(self) -> int:
        return 1 if self.n is None else self.n

    def check(self) -> None:
        """What one field says about another."""
        options = self.stream_options
        if options is not None and not self.stream:
            raise InvalidRequest("stream_options needs stream: true", field="stream_options")
        if options is not None and options.continuous_usage_stats:
            field = "stream_options.continuous_usage_stats"
            raise InvalidRequest(f"{field} is not supported here: send include_usage", field=field)

    def sampling(self, *, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None) -> SamplingParams:
        return SamplingParams(
            temperature=self.temperature,
            max_tokens=max_tokens,
            ignore_eos=bool(self.ignore_eos),
            top_k=self.top_k,
            top_p=self.top_p,
            session_id=self.session_id,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            n=self.choices,
            stop=self.stop or (),                         # a text is one stop string
            stop_token_ids=self.stop_token_ids or (),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            logit_bias=self.logit_bias,                   # type: ignore[arg-type]    # JSON's keys are texts
            skip_special_tokens=self.skip_special_tokens is not False,
            cache_salt=self.cache_salt,
        )


class ChatRequest(_Request, kw_only=True):
    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Scalar] | None = None

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true", field="top_logprobs")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
            raise InvalidRequest(
                f"top_logprobs must be from 0 to {MAX_TOP_LOGPROBS}, not {str(self.top_logprobs)[:40]}", field="top_logprobs"
            )
        both = self.max_tokens is not None and self.max_completion_tokens is not None
        if both and self.max_tokens != self.max_completion_tokens:
            raise InvalidRequest("max_tokens and max_completion_tokens differ: send one of them", field="max_tokens")
        most = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        if most is not None and not 1 <= most < 2**31:
            field = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
            raise InvalidRequest(f"{field} must be from 1 to {2**31 - 1}, not {str(most)[:40]}", field=field)
        arguments = self.chat_template_kwargs or {}
        if len(arguments) > MAX_TEMPLATE_ARGUMENTS:
            raise InvalidRequest(
                f"chat_template_kwargs has {len(arguments)} entries, at most {MAX_TEMPLATE_ARGUMENTS} are allowed",
                field="chat_template_kwargs",
            )
        for name, value in arguments.items():
            known = name.isidentifier() and len(name) <= 64 and name not in RESERVED and not name.startswith("_")
            if not known or (isinstance(value, str) and len(value) > MAX_NAME):
                message = f"chat_template_kwargs cannot have {name[:64]!r}: leave it out"
                raise InvalidRequest(message, field="chat_template_kwargs")

    @property
    def params(self) -> SamplingParams:
        most = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return self.sampling(
            max_tokens=most, logprobs=(self.top_logprobs or 0) if self.logprobs else None, prompt_logprobs=None
        )


class CompletionRequest(_Request, kw_only=True):
    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    echo: bool | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry for each prompt: a text, or token ids."""
        match self.prompt:
            case str(text):
                return [text]
            case [int(), *_] as tokens if all(isinstance(token, int) for token in tokens):
                return [[token for token in tokens if isinstance(token, int)]]
            case [_, *_] as several if len(several) <= MAX_PROMPTS and not any(isinstance(one, int) for one in several):
                return [one for one in several if not isinstance(one, int)]
            case several if len(several) > MAX_PROMPTS:
                raise InvalidRequest(f"{len(several)} prompts, at most {MAX_PROMPTS} are allowed at once", field="prompt")
        raise InvalidRequest(
            "prompt must be a text, a list of texts, a list of token ids, or a list of lists of token ids", field="prompt"
        )

    @property
    def params(self) -> SamplingParams:
        most = COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens
        scored = self.logprobs if self.echo else None
        return self.sampling(max_tokens=most, logprobs=self.logprobs, prompt_logprobs=scored)
