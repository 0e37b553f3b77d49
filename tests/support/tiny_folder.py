"""write_tiny_folder(): the model of write_tiny_gguf() as a folder for transformers, written by the safetensors and tokenizers
libraries, so that both formats can be compared number by number.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from engine.weights.gguf_file import GgufFile
from engine.weights.tensors import to_float32
from tests.support.tiny_gguf import MERGES, SPECIAL, TEMPLATE, tiny_vocabulary, write_tiny_gguf

FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
MODEL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write_tiny_folder(
    folder: Path,
    family: str = "llama",
    dtype: str = "F32",
    shards: int = 0,
    *,
    tied: bool = False,
    config: Mapping[str, object] | None = None,
    generation: Mapping[str, object] | None = None,
    seed: int = 0,
) -> Path:
    """Write the folder. dtype: F32, F16 or BF16. shards: 0 is one file without an index.

    `config` replaces keys of config.json (None as value: leaves one out); generation None: no generation_config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = tiny_tensors(folder, family, tied=tied, seed=seed)
    if shards:
        write_shards(folder, tensors, shards, dtype)
    else:
        (folder / "model.safetensors").write_bytes(encode_safetensors(tensors, dtype))
    write_json(folder / "config.json", {
        "architectures": [FAMILIES[family]],
        "model_type": family,
        "vocab_size": len(tiny_vocabulary()),
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
        **(config or {}),
    })
    if generation is not None:
        write_json(folder / "generation_config.json", generation)
    write_tokenizer(folder)
    return folder


def tiny_tensors(folder: Path, family: str, *, tied: bool = False, seed: int = 0) -> dict[str, np.ndarray]:
    """The weights of write_tiny_gguf() by the names of transformers, rows of query and key in its order."""
    path = write_tiny_gguf(folder / "same-weights.gguf", family, tied=tied, seed=seed)
    file = GgufFile(path)
    tensors = {_hf_name(name): _hf_rows(name, family, np.array(to_float32(tensor))) for name, tensor in file.tensors.items()}
    file.close()
    path.unlink()
    return tensors


def _hf_name(name: str) -> str:
    if name in MODEL_NAMES:
        return MODEL_NAMES[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[part]}.{kind}"


def _hf_rows(name: str, family: str, values: np.ndarray, head_size: int = 16) -> np.ndarray:
    """llama.cpp interleaves the two halves of each query and key head of llama; this is the way back."""
    if family != "llama" or not name.endswith(("attn_q.weight", "attn_k.weight")):
        return values
    return np.ascontiguousarray(values.reshape(-1, head_size // 2, 2, 64).swapaxes(1, 2).reshape(values.shape))


def encode_safetensors(tensors: Mapping[str, np.ndarray], dtype: str = "F32") -> bytes:
    """The bytes of a file; BF16, which NumPy does not have, is written as U16 and renamed in the header."""
    if dtype == "BF16":
        written = save({name: bfloat16(values) for name, values in tensors.items()})
        heads, data = decode_safetensors(written)
        return join_safetensors({name: {**head, "dtype": "BF16"} for name, head in heads.items()}, data)
    return save({name: values.astype({"F32": np.float32, "F16": np.float16}[dtype]) for name, values in tensors.items()})


def bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper halves of float32, not rounded."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def decode_safetensors(written: bytes) -> tuple[dict[str, dict], bytes]:
    """A file's header and its data, for tests that change one of them."""
    (length,) = struct.unpack_from("<Q", written)
    return json.loads(written[8 : 8 + length]), written[8 + length :]


def join_safetensors(header: object, data: bytes) -> bytes:
    """A file of a header (bytes are taken as they are) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def write_shards(folder: Path, tensors: Mapping[str, np.ndarray], count: int, dtype: str = "F32") -> dict[str, str]:
    """`count` shards, tensors dealt in turn, and their index; the index's weight_map."""
    shard_of = {name: f"model-{number % count + 1:05d}-of-{count:05d}.safetensors" for number, name in enumerate(tensors)}
    for shard in set(shard_of.values()):
        held = {name: values for name, values in tensors.items() if shard_of[name] == shard}
        (folder / shard).write_bytes(encode_safetensors(held, dtype))
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": shard_of})
    return shard_of


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def write_tokenizer(folder: Path) -> None:
    """The vocabulary of write_tiny_gguf() as tokenizer.json, with its settings and template."""
    vocabulary = {token: number for number, token in enumerate(tiny_vocabulary())}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in MERGES]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL[1], "eos_token": SPECIAL[2],
        "add_bos_token": False,
    })
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
