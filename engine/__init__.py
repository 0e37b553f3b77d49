"""Rillet: an async streaming LLM engine without PyTorch. This is the whole public API.

    from engine import Engine, EngineConfig, Message, SamplingParams
"""

from engine.api import Embedding, Engine, Prompt
from engine.client import AnswerStream, EngineClient, Vocabulary
from engine.config import EngineConfig, GenerationConfig
from engine.errors import (
    AnswerFailed,
    BackendError,
    BadModelFile,
    ConfigError,
    ContextTooLong,
    DeviceUnavailable,
    EngineClosed,
    InvalidRequest,
    ModelError,
    ModelNotFound,
    OutOfDeviceMemory,
    Overloaded,
    RequestError,
    RilletError,
    StepFailed,
    UnknownModel,
    UnsupportedModel,
)
from engine.flags import FLAGS, Flag, parse_environment, parse_flags
from engine.metrics import Histogram, Metrics, Statistics
from engine.model_facts import ModelFacts
from engine.remote import RemoteEngine
from engine.remote_service import EngineService
from engine.sampling import BOUNDS as SAMPLING_BOUNDS
from engine.sampling import SamplingParams
from engine.sequence import Logprob, TokenLogprobs
from engine.stream import Choice, Delta, Result, Stream, Usage
from engine.synchronous import EngineStream, GenerationOutput, StreamItem, SynchronousEngine
from engine.text.answer import AnswerParser, AnswerPart, Plain, ReasoningPart, TextPart, ToolCallPart
from engine.text.dialects import Dialect, Tool, choose_dialect
from engine.text.grammar import Grammar
from engine.text.messages import Message
from engine.wire import SECRET_BYTES, WireError
from engine.wire_async import Address, FrameStream, dial

__version__ = "0.1.0"
__all__ = [
    "FLAGS",
    "SAMPLING_BOUNDS",
    "SECRET_BYTES",
    "Address",
    "AnswerFailed",
    "AnswerParser",
    "AnswerPart",
    "AnswerStream",
    "BackendError",
    "BadModelFile",
    "Choice",
    "ConfigError",
    "ContextTooLong",
    "Delta",
    "DeviceUnavailable",
    "Dialect",
    "Embedding",
    "Engine",
    "EngineClient",
    "EngineClosed",
    "EngineConfig",
    "EngineService",
    "EngineStream",
    "Flag",
    "FrameStream",
    "GenerationConfig",
    "GenerationOutput",
    "Grammar",
    "Histogram",
    "InvalidRequest",
    "Logprob",
    "Message",
    "Metrics",
    "ModelError",
    "ModelFacts",
    "ModelNotFound",
    "OutOfDeviceMemory",
    "Overloaded",
    "Plain",
    "Prompt",
    "ReasoningPart",
    "RemoteEngine",
    "RequestError",
    "Result",
    "RilletError",
    "SamplingParams",
    "Statistics",
    "StepFailed",
    "Stream",
    "StreamItem",
    "SynchronousEngine",
    "TextPart",
    "TokenLogprobs",
    "Tool",
    "ToolCallPart",
    "UnknownModel",
    "UnsupportedModel",
    "Usage",
    "Vocabulary",
    "WireError",
    "__version__",
    "choose_dialect",
    "dial",
    "parse_environment",
    "parse_flags",
]
