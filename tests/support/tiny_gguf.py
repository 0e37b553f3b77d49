"""write_tiny_gguf(): a whole model of random weights in a GGUF of a few hundred kilobytes, for tests of every part."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quantize

from tests.support.gguf_bytes import encode_gguf

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "l d", "Ġwor ld", "Ġ t", "Ġt he", "i n", "1 2")


def byte_characters() -> list[str]:
    """GPT-2's alphabet, byte by byte (transformers' bytes_to_unicode, from its description)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def tiny_vocabulary() -> list[str]:
    """Three special tokens, the 256 bytes, the merged tokens."""
    return [*SPECIAL, *byte_characters(), *(merge.replace(" ", "") for merge in MERGES)]


def tokenizer_metadata(vocabulary: Sequence[str] | None = None, pre: str = "smollm") -> dict[str, object]:
    tokens = list(vocabulary or tiny_vocabulary())
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "tokenizer.ggml.merges": list(MERGES),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }


def model_metadata(
    family: str = "llama",
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_size: int = 16,
    width: int = 96,
    context: int = 512,
) -> dict[str, object]:
    return {
        "general.architecture": family,
        "general.name": f"tiny {family}",
        f"{family}.block_count": layers,
        f"{family}.context_length": context,
        f"{family}.embedding_length": hidden,
        f"{family}.feed_forward_length": width,
        f"{family}.attention.head_count": heads,
        f"{family}.attention.head_count_kv": kv_heads,
        f"{family}.attention.key_length": head_size,
        f"{family}.attention.value_length": head_size,
        f"{family}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{family}.rope.freq_base": 10000.0,
        f"{family}.rope.dimension_count": head_size,
    }


def write_tiny_gguf(
    path: Path,
    family: str = "llama",
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_size: int = 16,
    width: int = 96,
    vocabulary: Sequence[str] | None = None,
    storage: str = "F32",
    seed: int = 0,
    *,
    tied: bool = False,
    context: int = 512,
    metadata: dict[str, object] | None = None,
    extra: dict[str, np.ndarray] | None = None,
) -> Path:
    """Write a llama or qwen2 of random weights; matrices in `storage`, norms and biases in F32.

    storage: F32, F16, BF16, or what gguf can quantize (Q4_0 Q4_1 Q5_0 Q5_1 Q8_0); others get random valid blocks.
    `metadata` replaces keys (None as value: leaves one out); `extra` are more F32 tensors by their GGUF names.
    """
    tokens = list(vocabulary or tiny_vocabulary())
    draw = np.random.default_rng(seed)
    keys: dict[str, object] = {
        **model_metadata(family, layers, hidden, heads, kv_heads, head_size, width, context),
        **tokenizer_metadata(tokens, "qwen2" if family == "qwen2" else "smollm"),
        **(metadata or {}),
    }
    values: dict[str, np.ndarray] = {}

    def normal(name: str, *shape: int) -> None:
        values[name] = (draw.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32)

    def near_one(name: str, size: int) -> None:
        values[name] = (1.0 + 0.1 * draw.standard_normal(size)).astype(np.float32)

    normal("token_embd.weight", len(tokens), hidden)
    near_one("output_norm.weight", hidden)
    if not tied:
        normal("output.weight", len(tokens), hidden)
    for layer in range(layers):
        block = f"blk.{layer}."
        near_one(block + "attn_norm.weight", hidden)
        near_one(block + "ffn_norm.weight", hidden)
        for part, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            normal(f"{block}attn_{part}.weight", count * head_size, hidden)
            if family == "qwen2":
                values[f"{block}attn_{part}.bias"] = (0.1 * draw.standard_normal(count * head_size)).astype(np.float32)
        normal(block + "attn_output.weight", hidden, heads * head_size)
        normal(block + "ffn_gate.weight", width, hidden)
        normal(block + "ffn_up.weight", width, hidden)
        normal(block + "ffn_down.weight", hidden, width)
    values |= extra or {}
    tensors = {
        name: (value.shape, *_stored(value, storage if value.ndim == 2 else "F32", draw)) for name, value in values.items()
    }
    path.write_bytes(encode_gguf({key: value for key, value in keys.items() if value is not None}, tensors).data)
    return path


def _stored(values: np.ndarray, storage: str, draw: np.random.Generator) -> tuple[int, bytes]:
    kind = GGMLQuantizationType[storage]
    try:
        return int(kind), quantize(values, kind).tobytes()
    except NotImplementedError:
        return int(kind), _random_blocks(values, kind, draw)


# Where the float16 scales of a block stand, in bytes, for types that gguf reads but cannot write
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,)}


def _random_blocks(values: np.ndarray, kind: GGMLQuantizationType, draw: np.random.Generator) -> bytes:
    """Random bits with small scales: valid blocks of weights of about the right size, with no meaning."""
    block, size = GGML_QUANT_SIZES[kind]
    if values.shape[-1] % block:
        raise ValueError(f"{kind.name} needs rows of a multiple of {block}, these have {values.shape[-1]}")
    blocks = draw.integers(0, 256, (values.size // block, size), dtype=np.uint8)
    for place in SCALES[kind.name]:
        blocks[:, place : place + 2] = np.full((len(blocks), 1), 1e-3, np.float16).view(np.uint8)
    return blocks.tobytes()
