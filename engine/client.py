"""EngineClient: what the server asks of an engine, whether it runs in this process or in another one.

engine.api.Engine is one, engine.remote.RemoteEngine the other. Both raise the same errors at the same moments, so nobody
who holds one need know which it is.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Protocol

from engine.errors import UnknownModel
from engine.metrics import Statistics
from engine.model_facts import ModelFacts
from engine.sampling import SamplingParams
from engine.sequence import TokenLogprobs
from engine.step import FloatArray
from engine.stream import Delta, Result, Usage
from engine.text.dialects import Dialect
from engine.text.messages import Message

__all__ = ["AnswerStream", "EngineClient", "PooledStates", "Vocabulary", "check_name"]


class Vocabulary(Protocol):
    """The vocabulary as far as answers need it; encoding is the engine's (EngineClient.tokenize)."""

    @property
    def pieces(self) -> tuple[bytes, ...]: ...
    @property
    def special_ids(self) -> frozenset[int]: ...
    @property
    def bos_id(self) -> int | None: ...
    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str: ...
    def token_text(self, token: int) -> str: ...


class AnswerStream(Protocol):
    """engine.stream.Stream's face."""

    @property
    def prompt_token_ids(self) -> tuple[int, ...]: ...
    @property
    def prompt_logprobs(self) -> list[TokenLogprobs] | None: ...
    @property
    def usage(self) -> Usage: ...
    @property
    def ready(self) -> bool: ...
    def __aiter__(self) -> AsyncIterator[Delta]: ...
    async def __anext__(self) -> Delta: ...
    async def collect(self) -> Result: ...
    def cancel(self) -> None: ...
    async def aclose(self) -> None: ...


class PooledStates(Protocol):
    """engine.api.Embedding's face."""

    @property
    def vector(self) -> FloatArray: ...
    @property
    def prompt_tokens(self) -> int: ...


class EngineClient(Protocol):
    """Everything is called on one event loop; properties answer at once."""

    @property
    def model_name(self) -> str: ...
    @property
    def model_names(self) -> tuple[str, ...]: ...
    def check_model(self, name: str | None) -> None: ...
    @property
    def context_length(self) -> int: ...
    @property
    def device(self) -> str: ...
    @property
    def has_chat_template(self) -> bool: ...
    @property
    def chat_template(self) -> str | None: ...
    @property
    def model_facts(self) -> ModelFacts: ...
    @property
    def sampling_defaults(self) -> dict[str, float | int]: ...
    @property
    def tokenizer(self) -> Vocabulary: ...
    @property
    def dialect(self) -> Dialect: ...
    @property
    def failure(self) -> Exception | None: ...

    async def stream(
        self, prompt: str | Sequence[int] | Sequence[Message | Mapping[str, Any]], params: SamplingParams | None = None,
        **keywords: Any,
    ) -> AnswerStream: ...  # fmt: skip
    async def embed(
        self, prompt: str | Sequence[int] | Sequence[Message | Mapping[str, Any]], *,
        pooling: Literal["mean", "last"] = "mean",
    ) -> PooledStates: ...  # fmt: skip
    async def tokenize(
        self, prompt: str | Sequence[int] | Sequence[Message | Mapping[str, Any]], *, add_special: bool = True,
        tools: list[dict[str, Any]] | None = None, template_arguments: Mapping[str, Any] | None = None,
    ) -> list[int]: ...  # fmt: skip
    async def infill(self, prefix: str, suffix: str) -> list[int]:
        """Token ids that ask for what stands between the two; InvalidRequest if the vocabulary has no such tokens."""
        ...
    async def apply_chat_template(
        self, messages: Sequence[Message | Mapping[str, Any]], *, add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None, **arguments: Any,
    ) -> str: ...  # fmt: skip
    async def look(self) -> Statistics:
        """Counts of now and the metrics since the start."""
        ...

    async def wait_failed(self) -> Exception: ...
    async def drain(self, deadline_s: float = 30.0) -> None: ...
    async def close(self) -> None: ...
    async def __aenter__(self) -> "EngineClient": ...
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


def check_name(name: str | None, names: Sequence[str]) -> None:
    """Raise UnknownModel unless `name` is one of the model's names, or not given. Ollama's clients add ":latest" to a name
    that has no tag, and send it to other addresses too."""
    bare = (name or "").removesuffix(":latest")
    if name and bare not in names and f"{bare}:latest" not in names:
        raise UnknownModel(f"the model {name[:100]!r} is not served here: there are {', '.join(names)}", field="model")
