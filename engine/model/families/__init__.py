"""The registry of families: metadata -> ModelSpec, and a file's tensors -> where each canonical tensor lies.

engine.weights.checkpoint calls it, for GGUF files and for folders of safetensors. To add a family: a file beside this one
with a function per format, and a line in GGUF_FAMILIES and CONFIG_FAMILIES.
"""

from collections.abc import Callable, Mapping
from functools import partial

from engine.errors import UnsupportedModel
from engine.model.families.config_json import ConfigJson
from engine.model.families.gguf_metadata import GgufMetadata
from engine.model.families.gguf_names import READ_WITH_THE_SPEC, gguf_places
from engine.model.families.glm4 import glm4_from_config, glm4_from_gguf
from engine.model.families.hf_names import hf_places, is_harmless
from engine.model.families.llama import llama_from_config, llama_from_gguf
from engine.model.families.mistral import mistral_from_config
from engine.model.families.places import find_parts
from engine.model.families.qwen import (
    qwen2_from_config,
    qwen2_from_gguf,
    qwen2moe_from_config,
    qwen2moe_from_gguf,
    qwen3_from_config,
    qwen3_from_gguf,
    qwen3moe_from_config,
    qwen3moe_from_gguf,
)
from engine.model.spec import ModelSpec
from engine.weights.tensors import Part, RawTensor

__all__ = ["CONFIG_FAMILIES", "GGUF_FAMILIES", "gguf_parts", "safetensors_parts", "spec_from_config", "spec_from_gguf"]

GgufFamily = Callable[[GgufMetadata, Mapping[str, RawTensor]], ModelSpec]
ConfigFamily = Callable[[ConfigJson], ModelSpec]

GGUF_FAMILIES: dict[str, GgufFamily] = {
    "llama": llama_from_gguf,
    "llama2": llama_from_gguf,             # no converter of today writes these three
    "llama3": llama_from_gguf,
    "mistral": llama_from_gguf,
    "qwen2": qwen2_from_gguf,
    "qwen3": qwen3_from_gguf,
    "qwen2moe": qwen2moe_from_gguf,
    "qwen3moe": qwen3moe_from_gguf,
    "glm4": glm4_from_gguf,
}
# By the name in `architectures`: the `model_type` that goes with it, and the function
CONFIG_FAMILIES: dict[str, tuple[str, ConfigFamily]] = {
    "LlamaForCausalLM": ("llama", llama_from_config),
    "MistralForCausalLM": ("mistral", mistral_from_config),
    "Qwen2ForCausalLM": ("qwen2", qwen2_from_config),
    "Qwen3ForCausalLM": ("qwen3", qwen3_from_config),
    "Qwen2MoeForCausalLM": ("qwen2_moe", qwen2moe_from_config),
    "Qwen3MoeForCausalLM": ("qwen3_moe", qwen3moe_from_config),
    "Glm4ForCausalLM": ("glm4", glm4_from_config),
}


def spec_from_gguf(values: Mapping[str, object], tensors: Mapping[str, RawTensor], file: str) -> ModelSpec:
    """What the model in `file` is. `tensors` by their GGUF names. Raises UnsupportedModel and BadModelFile."""
    metadata = GgufMetadata(values, file)
    family = GGUF_FAMILIES.get(metadata.architecture)
    if family is None:
        raise UnsupportedModel(
            f"{file}: its architecture is {metadata.architecture[:80]!r}, Rillet has {', '.join(sorted(GGUF_FAMILIES))}: "
            "take one of these"
        )
    return family(metadata, tensors)


def gguf_parts(spec: ModelSpec, tensors: Mapping[str, RawTensor], file: str) -> dict[str, Part]:
    """Canonical name -> where it lies in the GGUF file. `tensors` by their GGUF names.

    Raises BadModelFile for a tensor that is missing or of another shape, and UnsupportedModel for one that would be left
    out.
    """
    return find_parts(spec, tensors, partial(gguf_places, spec), READ_WITH_THE_SPEC.__contains__, file)


def spec_from_config(config: Mapping[str, object], file: str) -> ModelSpec:
    """What the model of a parsed config.json is; `file` is its path. Raises UnsupportedModel and BadModelFile."""
    keys = ConfigJson(config, file)
    known = ", ".join(CONFIG_FAMILIES)
    match config.get("architectures"):
        case [str(architecture)] if architecture in CONFIG_FAMILIES:
            keys.model = architecture
            model_type, family = CONFIG_FAMILIES[architecture]
            keys.must_be("model_type", model_type)
            return family(keys)
        case [str(architecture)] if architecture.endswith("ForConditionalGeneration"):
            raise UnsupportedModel(
                f"{file}: its architecture is {architecture[:80]}, which reads images or audio too; Rillet has models of "
                f"text alone: take one of {known}"
            )
        case [str(architecture)]:
            raise UnsupportedModel(
                f"{file}: its architecture is {architecture[:80]!r}, Rillet has {known}: take one of these"
            )
        case other:
            raise keys.bad("architectures", other, f"a list of exactly one of {known}")


def safetensors_parts(spec: ModelSpec, tensors: Mapping[str, RawTensor], file: str) -> dict[str, Part]:
    """Canonical name -> where it lies in the safetensors files. `tensors` by the names that transformers gives them.

    Raises as gguf_parts does.
    """
    return find_parts(spec, tensors, partial(hf_places, spec), partial(is_harmless, spec, tensors), file)
