"""The request of /v1/responses as a struct, and the ChatRequest that says the same.

server.decoding fills it, server.responses_api reads it. Nothing is stored, so what would need an earlier response is refused;
so are tools that OpenAI runs itself. Errors name the fields of this request, own_field() those that come later.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from msgspec import Meta, Struct

from engine import InvalidRequest, RequestError
from server.chat_messages import Name
from server.protocol import MAX_MESSAGES, MAX_TOP_LOGPROBS, Body, ChatRequest, Effort, Scalar
from server.responses_input import InputItem, messages_of
from server.structured import JsonSchema, ResponseFormat, Wanted, wanted_structure
from server.tools import MAX_TOOLS, FunctionName, FunctionSpec, NamedChoice, ToolName, ToolSpec
from server.unsupported import COMMON

__all__ = ["ResponsesRequest", "own_field"]

E = TypeVar("E", bound=RequestError)
MAX_INCLUDES = 64
MAX_KEY = 64
LOGPROBS = "message.output_text.logprobs"
# The others belong to tools that are refused, but for encrypted reasoning: it is told in plain words.
INCLUDES = frozenset({
    LOGPROBS, "reasoning.encrypted_content", "file_search_call.results", "web_search_call.results",
    "web_search_call.action.sources", "message.input_image.image_url", "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
})  # fmt: skip
# Fields of this request that a chat's request has under the same names.
SAME = (
    "model", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos", "skip_special_tokens",
    "frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias", "session_id", "cache_salt",
    "chat_template_kwargs", "include_reasoning", "parallel_tool_calls",
)  # fmt: skip
OWN = {"messages": "input", "max_tokens": "max_output_tokens", "logprobs": "top_logprobs", "response_format": "text.format"}
# Fields that need something stored, the values that ask for nothing, and what to do instead.
STATEFUL: dict[str, tuple[Any, str]] = {
    "previous_response_id": (None, "nothing is stored here, send the whole conversation as input"),
    "conversation": (None, "nothing is stored here, send the whole conversation as input"),
    "prompt": (None, "nothing is stored here, send instructions and input"),
    "background": (False, "nothing is stored here, wait for the answer or stream it"),
}


class Reasoning(Struct):
    """No summaries are made: "auto" is none, the words themselves are in the reasoning item."""

    effort: Effort | None = None
    summary: str | None = None
    generate_summary: str | None = None
    context: str | None = None
    mode: str | None = None


class TextFormat(Struct):
    """strict changes nothing: the answer always matches."""

    type: str
    name: Annotated[str, Meta(max_length=256)] | None = None
    description: str | None = None
    schema: dict[str, Any] | bool | None = None
    strict: bool | None = None


class TextConfig(Struct):
    format: TextFormat | None = None
    verbosity: str | None = None


class ResponseTool(Struct):
    type: str
    name: ToolName | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseToolChoice(Struct):
    type: str
    name: ToolName | None = None


class TranslatedRequest(ChatRequest, kw_only=True):
    """A ChatRequest whose structure goes by the name that this request has for it."""

    wanted: Wanted | None = None

    @property
    def structure(self) -> Wanted | None:
        return self.wanted


class ResponsesRequest(Body, kw_only=True):
    """OpenAI's fields, and those for sampling that a chat's request has too. store is let through: nothing is stored."""

    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **COMMON,
        "messages": (None,),
        "n": (None, 1),
        "max_tokens": (None,),
        "max_completion_tokens": (None,),
        "logprobs": (None, False),
        "response_format": (None,),
        "reasoning_effort": (None,),
        "structured_outputs": (None,),
        **{f"guided_{kind}": (None, False) for kind in ("json", "regex", "choice", "grammar", "json_object")},
        "context_management": (None, []),
        "moderation": (None,),
    }
    CURES: ClassVar[Mapping[str, str]] = {
        "messages": "send them as input instead",
        "max_tokens": "send max_output_tokens instead",
        "max_completion_tokens": "send max_output_tokens instead",
        "logprobs": "send top_logprobs instead",
        "response_format": "send text.format instead",
        "json_schema": "send text.format instead",
        "reasoning_effort": "send reasoning.effort instead",
    }
    input: str | Annotated[list[InputItem], Meta(min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    tools: Annotated[list[ResponseTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: str | ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    include: Annotated[list[str], Meta(max_length=MAX_INCLUDES)] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    metadata: Annotated[dict[str, Annotated[str, Meta(max_length=512)]], Meta(max_length=16)] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    store: bool | None = None
    stream: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None
    background: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    session_id: Name | None = None
    cache_salt: Name | None = None
    chat_template_kwargs: dict[str, Scalar] | None = None
    include_reasoning: bool | None = None

    def check(self) -> None:
        for field, (nothing, cure) in STATEFUL.items():
            if getattr(self, field) not in (None, nothing):
                raise InvalidRequest(f"{field} is not supported: {cure}", field=field)
        if self.truncation == "auto":
            message = 'truncation "auto" is not supported: nothing is left out here, shorten the input yourself'
            raise InvalidRequest(message, field="truncation")
        for value in self.include or ():
            if value not in INCLUDES:
                known = ", ".join(sorted(INCLUDES))
                raise InvalidRequest(f"include has {value[:80]!r}: choose from {known}", field="include")
        if any(len(key) > MAX_KEY for key in self.metadata or ()):
            raise InvalidRequest(f"metadata has a key of more than {MAX_KEY} characters: shorten it", field="metadata")
        self._check_wishes()
        self.chat()                                      # what cannot be translated is refused here

    def _check_wishes(self) -> None:
        """Of text and reasoning: refuse what would change the answer and is not there."""
        reasoning, text = self.reasoning or Reasoning(), self.text or TextConfig()
        for field, value, harmless in (
            ("reasoning.summary", reasoning.summary, "auto"),
            ("reasoning.generate_summary", reasoning.generate_summary, "auto"),
            ("reasoning.context", reasoning.context, "auto"),
            ("reasoning.mode", reasoning.mode, "standard"),
            ("text.verbosity", text.verbosity, "medium"),
        ):
            if value not in (None, harmless):
                raise InvalidRequest(f"{field} is {value[:40]!r}: leave it out or send {harmless!r}", field=field)

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.top_logprobs) or LOGPROBS in (self.include or ())

    def chat(self) -> TranslatedRequest:
        """The same, said as a chat's request. InvalidRequest names this request's fields."""
        chat = TranslatedRequest(
            messages=messages_of(self.instructions, self.input),
            max_completion_tokens=self.max_output_tokens,
            logprobs=self.wants_logprobs,
            top_logprobs=(self.top_logprobs or 0) if self.wants_logprobs else None,
            tools=self._tools() or None,
            tool_choice=self._tool_choice(),
            reasoning_effort=self.reasoning.effort if self.reasoning is not None else None,
            wanted=self._wanted(),
            **{name: getattr(self, name) for name in SAME},
        )
        try:
            chat.check()
        except InvalidRequest as error:
            raise own_field(error) from None
        return chat

    def _tools(self) -> list[ToolSpec]:
        specs = []
        for at, tool in enumerate(self.tools or ()):
            if tool.type != "function":
                field = f"tools[{at}]"
                message = f"{field} is of type {tool.type[:40]!r}: there are no built-in tools, only functions of your own"
                raise InvalidRequest(message, field=field)
            if tool.name is None:
                raise InvalidRequest(f"tools[{at}].name is missing", field=f"tools[{at}].name")
            specs.append(ToolSpec(FunctionSpec(tool.name, tool.description, tool.parameters, tool.strict)))
        return specs

    def _tool_choice(self) -> str | NamedChoice | None:
        match self.tool_choice:
            case ResponseToolChoice(type, name):
                return NamedChoice(None if name is None else FunctionName(name), type)
            case choice:
                return choice

    def _wanted(self) -> Wanted | None:
        asked = self.text.format if self.text is not None else None
        if asked is None:
            return None
        if asked.type == "json_schema" and asked.schema is None:
            raise InvalidRequest("text.format.schema is missing", field="text.format.schema")
        schema = JsonSchema(asked.name, asked.description, asked.schema, asked.strict)
        try:
            wanted = wanted_structure(ResponseFormat(asked.type, schema), None, {})
        except InvalidRequest as error:
            raise own_field(error) from None
        if wanted is not None:
            wanted.field = "text.format"
        return wanted


def own_field(error: E) -> E:
    """The error with the field's name in this request, where a chat's request has another one for it."""
    field = (error.field or "").replace(".function.name", ".name")
    for theirs, ours in OWN.items():
        if field == theirs or field.startswith((theirs + ".", theirs + "[")):
            field = ours + field.removeprefix(theirs).partition("[")[0]
    message = str(error)
    if error.field and message.startswith(error.field):
        error.args = (field + message.removeprefix(error.field),)
    error.field = field or None
    return error
