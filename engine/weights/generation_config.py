"""What a model's makers advise: the tokens that end an answer, and how to sample. From generation_config.json or GGUF keys.

checkpoint.py calls it. Values are taken as the file states them, as vLLM does: `do_sample` is ignored, so that a model whose
file says false is not greedy by itself, and lengths (`max_new_tokens`) are the caller's. Advice that no request could ask for
is refused.
"""

from collections.abc import Mapping
from pathlib import Path

from engine.errors import BadModelFile, InvalidRequest
from engine.sampling import SamplingParams
from engine.weights.json_object import read_object

__all__ = ["read_end_ids", "read_generation_config", "sampling_from_gguf", "sampling_from_json"]

# The file's key -> the name in SamplingParams
GGUF_KEYS = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}
JSON_KEYS = {name: name for name in GGUF_KEYS.values()}
MAX_END_IDS, MAX_ID = 256, 2**31 - 1


def read_generation_config(folder: Path) -> dict[str, object]:
    """The object in the folder's generation_config.json; an empty one if there is no such file."""
    path = folder / "generation_config.json"
    return read_object(path) if path.exists() else {}


def read_end_ids(values: Mapping[str, object], file: str) -> frozenset[int]:
    """`eos_token_id` of a configuration: one id, several, or none (null). Raises BadModelFile."""
    value = values.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if len(ids) > MAX_END_IDS or not all(type(each) is int and 0 <= each <= MAX_ID for each in ids):
        raise BadModelFile(
            f"eos_token_id is {str(value)[:80]}, it must be ids from 0 to {MAX_ID:,}: download the file again", file=file
        )
    return frozenset(ids)


def sampling_from_gguf(values: Mapping[str, object], file: str) -> dict[str, float | int]:
    """SamplingParams' names -> what a GGUF file's metadata advise. Raises BadModelFile."""
    return _advice(values, GGUF_KEYS, file)


def sampling_from_json(values: Mapping[str, object], file: str) -> dict[str, float | int]:
    """SamplingParams' names -> what a generation_config.json advises. Raises BadModelFile."""
    return _advice(values, JSON_KEYS, file)


def _advice(values: Mapping[str, object], names: Mapping[str, str], file: str) -> dict[str, float | int]:
    advice: dict[str, float | int] = {}
    for key, name in names.items():
        value = values.get(key)
        if value is None:
            continue
        try:
            SamplingParams(**{name: value})  # type: ignore[arg-type]  # it checks the type
        except InvalidRequest as error:
            raise BadModelFile(f"{key}: {error}: correct it, or download the file again", file=file) from None
        assert isinstance(value, int | float), name
        advice[name] = value
    return advice
