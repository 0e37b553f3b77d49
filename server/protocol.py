"""Requests of /v1/chat/completions and /v1/completions as structs, and what the engine gets of them.

server.decoding fills them, the routes read them. Whatever is wrong becomes InvalidRequest with the field's name. Numbers are
bounded by SamplingParams, sizes here; it never touches the engine.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta, Struct

from engine import InvalidRequest, SamplingParams
from server.chat_messages import MAX_NAME, ChatMessage, Name, TextPart
from server.structured import Choices, ResponseFormat, Schema, StructuredOutputs, Wanted, wanted_structure
from server.tools import MAX_TOOLS, NamedChoice, ToolSpec, check_tools
from server.unsupported import CHAT, COMPLETION

__all__ = ["Body", "ChatMessage", "ChatRequest", "CompletionRequest", "StreamOptions", "TextPart"]

MAX_MESSAGES = 4096
MAX_PROMPTS = 256
MAX_TOP_LOGPROBS = 20
MAX_TEMPLATE_ARGUMENTS = 16
COMPLETION_TOKENS = 16                                    # OpenAI's default for /v1/completions
RESERVED = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"}     # of templates
    | {"chat_template", "deadline_s", "self"}                                                 # of the call
)

Scalar = bool | int | float | str | None
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class StreamOptions(Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Body(Struct, kw_only=True):
    """What every request's body has for server.decoding and server.asking. UNSUPPORTED: see server.unsupported;
    CURES: what to do instead, where it differs from what is said there."""

    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    CURES: ClassVar[Mapping[str, str]] = {}
    model: Name | None = None

    def check(self) -> None:
        """What one field says about another; InvalidRequest."""


class _Request(Body, kw_only=True):
    """What both requests have. None is "not said" everywhere, as OpenAI's clients send it."""

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
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    guided_json_object: bool | None = None

    @property
    def structure(self) -> Wanted | None:
        """What the answer must look like, and which field says so."""
        kinds = ("json", "regex", "choice", "grammar", "json_object")
        guided = {kind: getattr(self, f"guided_{kind}") for kind in kinds}
        return wanted_structure(self.response_format, self.structured_outputs, guided)

    @property
    def wants_usage(self) -> bool:
        """Whether the stream ends with a chunk of usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def wants_running_usage(self) -> bool:
        """Whether every chunk has the usage so far."""
        return self.wants_usage and self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)

    @property
    def choices(self) -> int:
        return 1 if self.n is None else self.n

    def check(self) -> None:
        """What one field says about another."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options needs stream: true", field="stream_options")
        self.structure                                   # noqa: B018 (it is refused here, before anything is asked)

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
            grammar=structure.grammar if (structure := self.structure) is not None else None,
        )


class ChatRequest(_Request, kw_only=True):
    """reasoning_effort reaches the chat template: see template_arguments. include_reasoning false leaves thinking out of the
    answer; it is thought nevertheless. parallel_tool_calls false: of several calls only the first is told."""

    UNSUPPORTED = CHAT
    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Scalar] | None = None
    tools: Annotated[list[ToolSpec], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: str | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    include_reasoning: bool | None = None

    def check(self) -> None:
        super().check()
        check_tools(self.tools, self.tool_choice)
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
    def template_arguments(self) -> dict[str, Scalar]:
        """What the chat template gets. Templates know different names for thinking and ignore those that they do not know;
        an effort of "none" turns thinking off, any other turns it on and is told; chat_template_kwargs win."""
        arguments: dict[str, Scalar] = {}
        if self.reasoning_effort is not None:
            thinking = self.reasoning_effort != "none"
            arguments = {"enable_thinking": thinking, "thinking": thinking}
            if thinking:
                arguments["reasoning_effort"] = self.reasoning_effort
        return arguments | (self.chat_template_kwargs or {})

    @property
    def params(self) -> SamplingParams:
        most = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return self.sampling(
            max_tokens=most, logprobs=(self.top_logprobs or 0) if self.logprobs else None, prompt_logprobs=None
        )


class CompletionRequest(_Request, kw_only=True):
    UNSUPPORTED = COMPLETION
    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None

    def check(self) -> None:
        super().check()
        if self.suffix and self.echo:
            raise InvalidRequest("echo shows a prompt that has no suffix: leave one of them out", field="echo")
        if self.suffix and not all(isinstance(prompt, str) for prompt in self.prompts):
            raise InvalidRequest("suffix needs prompts that are texts: send no token ids", field="suffix")

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
