"""Every variant of every Metal kernel that the backend asks for, as calls that can be traced without running.

make_snapshots.py writes what MLX generates for them, test_metal_snapshots.py compares. Who has more kernels adds to CALLS.
"""

from collections.abc import Callable, Iterator
from itertools import product

import mlx.core as mx
import numpy as np

from backends.mlx.metal import PAGE, LayerPools, MetalKernels
from backends.mlx.metal_norms import NormKernels, rope_table
from backends.mlx.metal_sampling import SamplingKernels
from tests.mlx.product_variants import product_calls
from tests.mlx.shim import ShimMetal

__all__ = ["CALLS", "Call", "generated"]

Call = tuple[str, Callable[[Callable], object]]
"""A variant's name, and what calls it with a make_kernel."""

SIZES = (64, 80, 96, 128, 256)
DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
WIDTHS = (576, 1024, 1536, 2560, 4096, 5120, 8192)             # of models that there are
VOCABULARIES = (32_000, 49_152, 128_256, 151_936, 262_144)
BOTH = tuple(product((True, False), repeat=2))
PARTIAL = ((64, 16), (80, 32), (96, 48), (128, 64), (256, 64))


def attention_calls() -> Iterator[Call]:
    for size in SIZES:
        for dtype in DTYPES:
            for item in (dtype, "int8", "e4m3"):
                yield f"{size} {dtype} {item}", lambda make, of=(size, dtype, item): call_attention(MetalKernels(make), *of)


def call_attention(kernels, size, dtype, item):
    """8 heads on 2 KV heads: one write, decoding over short and long contexts, one prompt."""
    dtype, pools = DTYPES[dtype], pools_of(size, item)
    ints = mx.zeros(8, mx.int32)
    new = mx.zeros((8, 2, size), dtype)
    token = kernels.write_cache(new, new, pools, ints)
    q = mx.zeros((8, 8, size), dtype)
    for pages in (8, 16):
        kernels.attend_decode(q, pools, mx.zeros((8, pages), mx.int32), ints, token, 0.125)
    kernels.attend_prefill(q, pools, mx.zeros((8, 8), mx.int32), mx.zeros(9, mx.int32), ints, token, 0.125)


def grouping_calls() -> Iterator[Call]:
    for group in (1, 2, 3, 5, 7, 8, 12, 16):
        yield f"group {group}", lambda make, group=group: call_groupings(MetalKernels(make), NormKernels(make), group)


def call_groupings(kernels, norms, group):
    """Heads on one KV head and contexts of every number of splits, for one token: the constants that follow from shapes."""
    pools, one = pools_of(128, "bfloat16", kv_heads=1), mx.zeros(8, mx.int32)
    q, qkv = mx.zeros((1, group, 128), mx.bfloat16), mx.zeros((1, group + 2, 128), mx.bfloat16)
    _, token = norms.rope_and_write(qkv, pools, one, one, rope_table(np.ones(64), halves=True))
    for splits in (1, 2, 4, 8, 16, 32):
        kernels.attend_decode(q, pools, mx.zeros((1, 8 * splits), mx.int32), one[:1], token, 0.125)
    kernels.attend_prefill(q, pools, mx.zeros((1, 8), mx.int32), one[:2], one[:1], token, 0.125)


def pools_of(size, item, kv_heads=2):
    """A cache of 4 pages."""
    shape, kind = (4 * PAGE, kv_heads, size), {**DTYPES, "int8": mx.int8, "e4m3": mx.uint8}[item]
    scales = [mx.zeros(shape[:2])] * 2 if item == "int8" else []
    return LayerPools(mx.zeros(shape, kind), mx.zeros(shape, kind), *scales)


def norm_calls() -> Iterator[Call]:
    for dtype in DTYPES:
        yield dtype, lambda make, dtype=dtype: call_norms(NormKernels(make), DTYPES[dtype])


def call_norms(kernels, dtype):
    """A sum and its norm for each width, and activations."""
    for width in WIDTHS:
        x = mx.zeros((8, width), dtype)
        kernels.add_rms_norm(x, x, mx.zeros(width, dtype), 1e-6)
    for activation in ("silu", "gelu_tanh"):
        kernels.gated(mx.zeros((8, 2048), dtype), activation)


def rope_calls() -> Iterator[Call]:
    """Caches of the activations' own type or E4M3, as models have them; int8 and a part of the head for one pairing each."""
    for size, part in PARTIAL:
        for dtype in DTYPES:
            for item, halves, norm, rotary in (
                *((item, halves, norm, size) for item in (dtype, "e4m3") for halves, norm in BOTH),
                ("int8", True, True, size),
                (dtype, False, False, part),
                (dtype, True, False, part),
            ):  # fmt: skip
                name = f"{size} {dtype} {item} {'halves' if halves else 'interleaved'}{' norm' * norm} {rotary}"
                of = size, dtype, item, halves, norm, rotary
                yield name, lambda make, of=of: call_rope(NormKernels(make), *of)


def call_rope(kernels, size, dtype, item, halves, norm, rotary):
    """8 tokens of 8 heads on 2 KV heads."""
    dtype = DTYPES[dtype]
    table = rope_table(np.ones(rotary // 2), halves=halves)
    norms = (mx.zeros(size, dtype), mx.zeros(size, dtype)) if norm else None
    ints = mx.zeros(8, mx.int32)
    kernels.rope_and_write(mx.zeros((8, 8 + 2 * 2, size), dtype), pools_of(size, item), ints, ints, table, norms)


def copy_calls() -> Iterator[Call]:
    for item in (*DTYPES, "int8", "e4m3"):
        yield item, lambda make, item=item: NormKernels(make).copy_pages(pools_of(128, item), mx.zeros((4, 2), mx.int32))


def sampling_calls() -> Iterator[Call]:
    for vocabulary in VOCABULARIES:
        yield str(vocabulary), lambda make, vocabulary=vocabulary: call_cut(SamplingKernels(make), vocabulary)


def call_cut(kernels, vocabulary):
    one = mx.zeros((1, 1))
    kernels.least_kept(mx.zeros((1, vocabulary)), one, one, np.array([vocabulary]), np.ones(1, np.float32))


CALLS: list[Callable[[], Iterator[Call]]] = [
    attention_calls, grouping_calls, norm_calls, rope_calls, copy_calls, product_calls, sampling_calls,
]  # fmt: skip


def generated() -> Iterator[tuple[str, dict[str, str]]]:
    """(variant, {kernel with its order in the call: MSL}) of each."""
    for calls in CALLS:
        for name, call in calls():
            metal = ShimMetal(run=False)
            call(metal.metal_kernel)
            texts = {}
            for msl in metal.generated.values():
                kernel = msl.split("[[kernel]] void custom_kernel_rillet_", 1)[1].split("__", 1)[0].split("(", 1)[0]
                texts[f"{kernel} {len(texts)}"] = msl
            yield name, texts
