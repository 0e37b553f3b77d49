"""EngineConfig and the one table of flags: the same names on every command line, and as RILLET_* variables.

A flag `--max-num-seqs` is the variable RILLET_MAX_NUM_SEQS and the field max_num_seqs; `-` and `_` are alike. Nothing here
opens a model or a device. Over 250 lines, because a field, its bounds and its flag are read side by side.
"""

import argparse
import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import isfinite
from pathlib import Path
from typing import Any, NoReturn

from engine.errors import ConfigError

__all__ = ["FLAGS", "EngineConfig", "Flag", "GenerationConfig", "parse_environment", "parse_flags"]

DTYPES = ("auto", "bf16", "f16", "f32")
DTYPE_NAMES = {"bfloat16": "bf16", "float16": "f16", "fp16": "f16", "half": "f16", "float32": "f32", "fp32": "f32"}
MODEL_SOURCES = ("huggingface", "modelscope")
ISQ_TYPES = {
    name.lower().replace("_", ""): name
    for name in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
}
TRUE, FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """vllm.rs's way to say how requests sample that do not say it themselves. Raises ConfigError."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None

    def __post_init__(self) -> None:
        _check_bounds(self)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How to run an engine. With no model named, the demo model is used if it is installed, else a small hub model.

    None means: decided by the model or the backend. The first fields stand in vllm.rs's order. temperature and its like win
    over generation_cfg. Raises ConfigError with the value and the cure.
    """

    model_id: str | None = None               # hub id
    weight_path: str | None = None            # folder of safetensors; a .gguf is understood
    weight_file: str | None = None            # GGUF file, or the name of one within model_id
    hf_token: str | None = field(default=None, repr=False)
    hf_token_path: str | None = None          # a file with the token, if hf_token does not say it
    max_num_seqs: int | None = None           # sequences in one step; None: the backend's default
    max_model_len: int | None = None          # context length; None: the model's, bounded by memory
    max_tokens: int | None = None             # of an answer that does not say; None: what the context length leaves
    isq: str | None = None                    # q4k, q4_k, q8_0 ...; kept as GGUF writes it, Q4_K
    num_shards: int = 1                       # of device_ids 0, 1, ... where those are not given
    device_ids: tuple[int, ...] = ()          # none given: the first num_shards
    generation_cfg: GenerationConfig | None = None
    seed: int | None = None
    flash_context: bool | None = None         # vllm.rs's other name for context_cache
    fp8_kvcache: bool = False
    context_cache: bool = False               # vllm.rs's name: session_id pins pages with it and without
    revision: str | None = None
    model_source: str = "huggingface"         # where model_id is: huggingface or modelscope
    offline: bool = False                     # ask no hub: take what is in the cache
    backend: str = "auto"
    dtype: str = "auto"                       # of what is not quantized; f32 on the cpu backend is the oracle
    threads: int = 0                          # 0: the cores that this process may use
    max_batch_tokens: int | None = None       # tokens in one step; None: the backend's default
    max_waiting: int = 1024                   # sequences waiting or running, beyond which requests are refused
    kv_fraction: float = 0.5                  # share of the free memory that the KV cache may take
    kv_bytes: int | None = None               # size of the KV cache instead of kv_fraction
    prefix_cache: bool = True
    lookahead: bool = True                    # submit the next step before this one's tokens are known
    chat_template: str | None = None          # a file with a Jinja template instead of the model's
    served_model_name: str | None = None
    temperature: float | None = None          # defaults of requests that do not say
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", DTYPE_NAMES.get(self.dtype, self.dtype))
        _check_choice("dtype", self.dtype, DTYPES)
        _check_choice("model_source", self.model_source, MODEL_SOURCES)
        _check_bounds(self)
        self._keep("device_ids", _devices(self.device_ids, self.num_shards or 1))
        self._keep("fp8_kvcache", bool(self.fp8_kvcache))                   # vllm.rs's None is no
        self._keep("context_cache", bool(self.context_cache or self.flash_context))
        self._keep("flash_context", self.context_cache)
        if self.isq is not None:
            name = ISQ_TYPES.get(str(self.isq).lower().replace("_", ""))
            if name is None:
                known = ", ".join(name.lower().replace("_k", "k") for name in ISQ_TYPES.values())
                raise ConfigError(f"isq must be one of {known}, not {self.isq!r}")
            self._keep("isq", name)

    def _keep(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def sampling_defaults(self) -> dict[str, float | int]:
        """What the flags say of sampling, and generation_cfg where they say nothing."""
        said = {name: getattr(self, name) for name in SAMPLING}
        if self.generation_cfg is not None:
            for field in fields(self.generation_cfg):
                said[field.name] = getattr(self.generation_cfg if said[field.name] is None else self, field.name)
        return {name: value for name, value in said.items() if value is not None}


SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty",
)  # fmt: skip
BOUNDS: tuple[tuple[str, float, float], ...] = (
    ("num_shards", 1, 1024),
    ("threads", 0, 4096),
    ("max_num_seqs", 1, 65536),
    ("max_model_len", 2, 2**31 - 1),
    ("max_tokens", 1, 2**31 - 1),
    ("max_batch_tokens", 1, 2**20),
    ("max_waiting", 1, 2**31 - 1),
    ("kv_fraction", 0.01, 0.99),
    ("kv_bytes", 1, 2**63),
    ("seed", -(2**63), 2**64 - 1),
    ("temperature", 0, 100),
    ("top_k", -1, 2**31 - 1),
    ("top_p", 1e-9, 1),
    ("min_p", 0, 1),
    ("repetition_penalty", 0.01, 100),
    ("frequency_penalty", -2, 2),
    ("presence_penalty", -2, 2),
)


FRACTIONS = frozenset(SAMPLING) - {"top_k"} | {"kv_fraction"}                # what need not be a whole number


def _check_bounds(config: EngineConfig | GenerationConfig) -> None:
    for name, low, high in BOUNDS:
        value = getattr(config, name, None)
        number = isinstance(value, (int, float) if name in FRACTIONS else int) and not isinstance(value, bool)
        if value is not None and not (number and isfinite(value) and low <= value <= high):
            raise ConfigError(f"{name} must be from {low:,} to {high:,}, not {value!r}")


def _devices(given: Iterable[int] | None, shards: int) -> tuple[int, ...]:
    """device_ids, checked; those that num_shards means where none are given."""
    if not isinstance(given, Iterable | None):
        raise ConfigError(f"device_ids must be a list, not {given!r}")
    devices = tuple(given or range(shards))                                 # vllm.rs's None and [] are understood
    if any(not isinstance(device, int) or device < 0 for device in devices) or len(set(devices)) < len(devices):
        raise ConfigError(f"device_ids must be different whole numbers from 0, not {devices!r}")
    if shards > 1 and shards != len(devices):
        raise ConfigError(f"num_shards is {shards}, but device_ids names {devices}: leave one of them out")
    return devices


@dataclass(frozen=True, slots=True)
class Flag:
    """One option: its name without dashes, the field it fills, how its text is read, and what it does."""

    name: str
    field: str
    kind: type
    help: str

    @property
    def variable(self) -> str:
        return "RILLET_" + self.name.upper().replace("-", "_")

    def read(self, text: str) -> Any:
        """The value that `text` stands for; ConfigError if it stands for none."""
        try:
            if self.kind is bool:
                if text.lower() not in TRUE + FALSE:
                    raise ValueError
                return text.lower() in TRUE
            if self.kind is tuple:
                return tuple(int(part) for part in text.split(","))
            return self.kind(text)
        except ValueError:
            wanted = {bool: "1 or 0", tuple: "numbers with commas", int: "a whole number", float: "a number"}
            raise ConfigError(f"--{self.name} must be {wanted.get(self.kind, 'a text')}, not {text!r}") from None


FLAGS: tuple[Flag, ...] = (
    Flag("m", "model_id", str, "hub id of the model, owner/name or owner/name:Q4_K_M; with --w only its name"),
    Flag("w", "weight_path", str, "folder with safetensors"),
    Flag("f", "weight_file", str, "GGUF file, or the name of one within --m"),
    Flag("revision", "revision", str, "branch, tag or commit of --m"),
    Flag("model-source", "model_source", str, "where --m is: huggingface (default) or modelscope"),
    Flag("offline", "offline", bool, "ask no hub: take what is in the cache"),
    Flag("hf-token", "hf_token", str, "Hugging Face token (default: HF_TOKEN, --hf-token-path, the stored login)"),
    Flag("hf-token-path", "hf_token_path", str, "file with a Hugging Face token"),
    Flag("backend", "backend", str, "auto (default) or the name of an installed one, such as cpu"),
    Flag("dtype", "dtype", str, "auto, bf16, f16 or f32: of weights that are not quantized"),
    Flag("d", "device_ids", tuple, "devices, such as 0,1"),
    Flag("threads", "threads", int, "threads of the cpu backend (default: the cores this process may use)"),
    Flag("max-num-seqs", "max_num_seqs", int, "sequences in one step (default: 256 cuda, 32 mlx, 16 cpu)"),
    Flag("max-model-len", "max_model_len", int, "context length (default: the model's, bounded by memory)"),
    Flag("max-tokens", "max_tokens", int, "tokens of an answer that does not say (default: what the context leaves)"),
    Flag("max-batch-tokens", "max_batch_tokens", int, "tokens in one step"),
    Flag("max-waiting", "max_waiting", int, "sequences waiting or running, beyond which requests are refused"),
    Flag("kv-fraction", "kv_fraction", float, "share of the free memory that the KV cache may take (default: 0.5)"),
    Flag("kv-bytes", "kv_bytes", int, "size of the KV cache in bytes, instead of --kv-fraction"),
    Flag("fp8-kvcache", "fp8_kvcache", bool, "keep the KV cache in 8 bits"),
    Flag("prefix-cache", "prefix_cache", bool, "reuse the pages of equal prefixes (default: 1)"),
    Flag("lookahead", "lookahead", bool, "submit the next step before this one's tokens are known (default: 1)"),
    Flag("context-cache", "context_cache", bool, "vllm.rs's name for pinning by session_id, which is always on"),
    Flag("isq", "isq", str, "quantize while loading (not built yet)"),
    Flag("seed", "seed", int, "seed of everything that is drawn without a seed of its own"),
    Flag("chat-template", "chat_template", str, "file with a Jinja chat template, instead of the model's"),
    Flag("served-model-name", "served_model_name", str, "name under which the model is served"),
    Flag("temperature", "temperature", float, "0 is greedy (default: the model's, else 1; in a chat 0.7)"),
    Flag("top-k", "top_k", int, "draw from the k most probable tokens"),
    Flag("top-p", "top_p", float, "draw from the likeliest tokens with this share (default: the model's, else 1; chat 0.95)"),
    Flag("min-p", "min_p", float, "drop tokens less probable than this share of the best one"),
    Flag("repetition-penalty", "repetition_penalty", float, "above 1: repeat less of prompt and answer"),
    Flag("frequency-penalty", "frequency_penalty", float, "-2 to 2: per time that a token stands in the answer"),
    Flag("presence-penalty", "presence_penalty", float, "-2 to 2: for tokens that stand in the answer"),
)


class _Parser(argparse.ArgumentParser):
    """argparse with our errors, so that a wrong flag is a ConfigError for every caller."""

    def error(self, message: str) -> NoReturn:
        wrong = message.removeprefix("unrecognized arguments: ").partition(" ")[0].partition("=")[0]
        close = difflib.get_close_matches(wrong, self._option_string_actions, 1) if wrong.startswith("-") else []
        cure = f"did you mean {close[0]}? " if close and wrong != message else ""
        raise ConfigError(f"{message} ({cure}--help lists every flag)")


def parse_flags(
    arguments: Sequence[str], own: Iterable[Flag] = (), *, program: str, description: str
) -> tuple[EngineConfig, dict[str, Any]]:
    """A command line -> the engine's config, and the values of the program's own flags by field (None: not given).

    A model may stand without a flag, as a path or a hub id: what --m takes. Flags of one letter may have one dash.
    """
    own = tuple(own)
    parser = _Parser(prog=program, description=description, allow_abbrev=False)
    parser.add_argument("model", nargs="?", metavar="MODEL", help="path or hub id of the model, the same as --m")
    for flag in (*FLAGS, *own):
        names = [f"--{flag.name}", *([f"-{flag.name}"] if len(flag.name) == 1 else [])]
        if flag.kind is bool:
            parser.add_argument(*names, dest=flag.field, nargs="?", const="1", metavar="0|1", help=flag.help)
        else:
            parser.add_argument(*names, dest=flag.field, metavar=flag.kind.__name__.upper(), help=flag.help)
    given = vars(parser.parse_args([_dashed(argument) for argument in arguments]))
    if (model := given.pop("model")) is not None:
        if named := [name for name in ("model_id", "weight_path") if given[name] is not None]:
            raise ConfigError(f"two models are named, {model!r} and {given[named[0]]!r}: leave one out")
        given["model_id"] = model
    values = {flag.field: flag.read(text) for flag in (*FLAGS, *own) if (text := given[flag.field]) is not None}
    return _split(values, own)


def parse_environment(environ: Mapping[str, str], own: Iterable[Flag] = ()) -> tuple[EngineConfig, dict[str, Any]]:
    """RILLET_* variables -> the same as parse_flags; a variable that nobody knows is a ConfigError."""
    own = tuple(own)
    known = {flag.variable: flag for flag in (*FLAGS, *own)}
    values = {}
    for variable, text in environ.items():
        if variable.startswith("RILLET_"):
            if variable not in known:
                close = difflib.get_close_matches(variable, known, 1) or sorted(known)
                raise ConfigError(f"{variable} is no setting of Rillet: did you mean {close[0]}?")
            values[known[variable].field] = known[variable].read(text)
    token = environ.get("HF_TOKEN")
    if token:
        values.setdefault("hf_token", token)
    return _split(values, own)


def _split(values: dict[str, Any], own: tuple[Flag, ...]) -> tuple[EngineConfig, dict[str, Any]]:
    extra = {flag.field: values.pop(flag.field, None) for flag in own}
    return EngineConfig(**values), extra


def _dashed(argument: str) -> str:
    """--max_num_seqs=4 -> --max-num-seqs=4"""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def read_chat_template(config: EngineConfig) -> str | None:
    """The text of --chat-template, or None."""
    if config.chat_template is None:
        return None
    path = Path(config.chat_template)
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template {path}: {error}: give a readable UTF-8 file") from None


def read_hf_token(config: EngineConfig) -> str | None:
    """hf_token, else None if HF_TOKEN is set, else what stands in the file hf_token_path, else None.

    With None the hub's own client looks where it always does: HF_TOKEN, then the stored login.
    """
    if config.hf_token is not None or config.hf_token_path is None or os.environ.get("HF_TOKEN"):
        return config.hf_token
    path = Path(config.hf_token_path).expanduser()
    try:
        return path.read_text("utf-8").strip() or None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"hf_token_path {path}: {error}: give a readable file with a hub token") from None
