"""Rillet: an async streaming LLM engine without PyTorch. This is the whole public API.

    from engine import Engine, EngineConfig, Message, SamplingParams
"""

from engine.api import Embedding, Engine, Prompt
from engine.config import EngineConfig, GenerationConfig
from engine.errors import (
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
from engine.flags import Flag, parse_environment, parse_flags
from engine.metrics import Histogram, Metrics, Statistics
from engine.sampling import SamplingParams
from engine.sequence import Logprob, TokenLogprobs
from engine.stream import Choice, Delta, Result, Stream, Usage
from engine.synchronous import EngineStream, GenerationOutput, StreamItem, SynchronousEngine
from engine.text.messages import Message

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "BadModelFile",
    "Choice",
    "ConfigError",
    "ContextTooLong",
    "Delta",
    "DeviceUnavailable",
    "Embedding",
    "Engine",
    "EngineClosed",
    "EngineConfig",
    "EngineStream",
    "Flag",
    "GenerationConfig",
    "GenerationOutput",
    "Histogram",
    "InvalidRequest",
    "Logprob",
    "Message",
    "Metrics",
    "ModelError",
    "ModelNotFound",
    "OutOfDeviceMemory",
    "Overloaded",
    "Prompt",
    "RequestError",
    "Result",
    "RilletError",
    "SamplingParams",
    "Statistics",
    "StepFailed",
    "Stream",
    "StreamItem",
    "SynchronousEngine",
    "TokenLogprobs",
    "UnknownModel",
    "UnsupportedModel",
    "Usage",
    "__version__",
    "parse_environment",
    "parse_flags",
]
