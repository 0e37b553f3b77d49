"""Whether each family of Metal kernels does on this device what MLX's own operations do. session.py asks while it loads.

A kernel that does not compile, or that gives other numbers, must cost speed and not the engine: what fails here is left out,
and one line says so. The model's own shapes and types are tried, so that the variants it will need are compiled here too.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from math import inf

import mlx.core as mx
import numpy as np

from backends.mlx.cache import Cache, PortableCache
from backends.mlx.choosing import least_kept
from backends.mlx.dequantize import dequantize_blocks
from backends.mlx.matrices import Product
from backends.mlx.metal import HEAD_SIZES
from backends.mlx.metal_cache import MetalCache, PagedKernels
from backends.mlx.metal_norms import NormKernels
from backends.mlx.metal_sampling import SamplingKernels
from backends.mlx.ops import Ops
from backends.mlx.steps import PAGE_TOKENS, PaddedStep
from engine.errors import RilletError, StepFailed
from engine.model.spec import Attention, ModelSpec
from engine.weights.tensors import RawTensor

__all__ = ["attention_works", "norms_work", "product_works", "sampling_works"]

log = logging.getLogger("rillet")
TOLERANCES = {mx.float32: 1e-3, mx.float16: 1e-2, mx.bfloat16: 5e-2}     # of the largest number
TOLERANCE_FP8 = 0.15
PAGES = 6
ROWS, MOST_TOKENS = 40, 9                                                # of a product: one by one, and by tiles


def works(what: str, attempt: Callable[[], float], most: float) -> bool:
    """attempt: returns the largest error. Says why not."""
    try:
        error = attempt()
    except (RuntimeError, ValueError, RilletError) as why:               # a text that does not compile is a RuntimeError
        log.warning("%s: MLX's own operations, which are slower, as the Metal kernel fails: %.300s", what, why)
        return False
    if error <= most:
        return True
    log.warning("%s: MLX's own operations, which are slower, as the Metal kernel is wrong by %.2g", what, error)
    return False


def difference(found: mx.array, expected: mx.array) -> float:
    """The largest error, of the largest number; infinite if there is a NaN."""
    ours, exact = (np.array(each.astype(mx.float32)) for each in (found, expected))
    error = float(np.abs(ours - exact).max()) / max(float(np.abs(exact).max()), 1e-30)
    return error if np.isfinite(error) else inf


def normals(seed: int, *shape: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape, np.float32))


# ---- norms and activations ----------------------------------------------------------------------------------------------


def norms_work(norms: NormKernels, spec: ModelSpec, dtype: mx.Dtype) -> bool:
    """Sums with their norm, and gates with their activation."""
    fast, plain = Ops(spec.norm_epsilon, norms), Ops(spec.norm_epsilon)

    def attempt() -> float:
        x, y = (normals(seed, 5, spec.hidden_size).astype(dtype) for seed in (1, 2))
        weight = (1 + normals(3, spec.hidden_size) / 8).astype(dtype)
        pairs = list(zip(fast.add_rms_norm(x, y, weight), plain.add_rms_norm(x, y, weight), strict=True))
        for activation in sorted({layer.feed_forward.activation for layer in spec.layers}):
            gates = normals(4, 5, 2 * spec.hidden_size).astype(dtype)
            pairs.append((fast.gated(gates, activation), plain.gated(gates, activation)))
        return max(difference(*pair) for pair in pairs)

    return works("norms", attempt, TOLERANCES[dtype])


# ---- the cache and attention --------------------------------------------------------------------------------------------


def attention_works(kernels: PagedKernels, spec: ModelSpec, dtype: mx.Dtype, *, fp8: bool) -> bool:
    """Rope, writes in place, and attention of prompts and of single tokens, for each kind of layer."""
    sizes = sorted({layer.attention.head_size for layer in spec.layers} - set(HEAD_SIZES))
    if sizes:
        log.warning("head size %d has no Metal kernel: attention is MLX's own, and slower", sizes[0])
        return False
    ops = Ops(spec.norm_epsilon)
    kinds = {layer.attention: layer for layer in spec.layers}
    item = mx.uint8 if fp8 else dtype

    def attempt() -> float:
        if not kernels.attention.self_check():
            raise StepFailed("what was written in place was not read back")
        worst = 0.0
        for kind, layer in kinds.items():
            one = replace(spec, layers=(layer,))
            caches = MetalCache(one, ops, PAGES, item, kernels), PortableCache(one, ops, PAGES, dtype)
            ours, exact = (attended(cache, kind, dtype) for cache in caches)
            worst = max(worst, *(difference(*pair) for pair in zip(ours, exact, strict=True)))
        return worst

    return works("attention", attempt, TOLERANCE_FP8 if fp8 else TOLERANCES[dtype])


def attended(cache: Cache, kind: Attention, dtype: mx.Dtype) -> list[mx.array]:
    """What two sequences see: their prompts, a token each, a token beside a piece of a prompt, one's page copied before."""
    scales = (1 + normals(5, 2, kind.head_size) / 8).astype(dtype)
    norms = (scales[0], scales[1]) if kind.qk_norm else None
    found = []
    first, copied, second = [2, 0], [4, 0], [1, 3]
    for number, (rows, copies) in enumerate((
        ([(9, 0, first), (40, 0, second)], []),
        ([(1, 9, first), (1, 40, second)], []),
        ([(1, 10, copied), (3, 41, second)], [(2, 4)]),
    )):  # fmt: skip
        step = step_of(rows)
        qkv = normals(10 + number, len(step.tokens), kind.heads + 2 * kind.kv_heads, kind.head_size).astype(dtype)
        pages = cache.open(step, np.array(copies, np.int32).reshape(-1, 2))
        mixed = pages.attend(0, kind, pages.place(0, kind, norms, qkv))
        mx.eval(mixed, *pages.written)
        found.append(mixed[: step.count])
    return found


def step_of(rows: Iterable[tuple[int, int, list[int]]]) -> PaddedStep:
    """Rows of (tokens, tokens before them, pages)."""
    rows = list(rows)
    positions = [before + at for count, before, _ in rows for at in range(count)]
    slots = [
        pages[(before + at) // PAGE_TOKENS] * PAGE_TOKENS + (before + at) % PAGE_TOKENS
        for count, before, pages in rows
        for at in range(count)
    ]
    return PaddedStep(
        tokens=np.zeros(len(positions), np.int32),
        positions=np.array(positions, np.int32),
        slots=np.array(slots, np.int32),
        row_starts=np.cumsum([0, *(count for count, _, _ in rows)]).astype(np.int32),
        kv_lengths=np.array([count + before for count, before, _ in rows], np.int32),
        page_tables=np.array([pages for _, _, pages in rows], np.int32),
        count=len(positions),
    )


# ---- products with native blocks ----------------------------------------------------------------------------------------


def product_works(product: Product, raw: RawTensor, dtype: mx.Dtype) -> bool:
    """The product with a tensor's storage type: one tensor of each type is enough."""
    return works(f"products with {raw.storage.name}", lambda: product_error(product, raw, dtype), TOLERANCES[dtype])


def product_error(product: Product, raw: RawTensor, dtype: mx.Dtype) -> float:
    """Of the tensor's first rows with one token, and with more than are taken one by one; as experts too."""
    kind, rows, columns = raw.storage, min(ROWS, raw.rows), raw.shape[-1]
    blocks = mx.array(raw.data[: rows * raw.row_bytes].reshape(rows, raw.row_bytes))
    dense = dequantize_blocks(kind.name, blocks, kind.bytes)
    worst = 0.0
    for tokens in (1, MOST_TOKENS):
        x = normals(20 + tokens, tokens, columns).astype(dtype)
        exact = mx.matmul(x.astype(mx.float32), dense.T)
        worst = max(worst, difference(product(x, blocks), exact))
        if rows % 2 == 0:
            chosen = mx.array([[token % 2] for token in range(tokens)], mx.int32)
            of_two = exact.reshape(tokens, 2, -1)[mx.arange(tokens), chosen[:, 0]]
            worst = max(worst, difference(product.by_choice(x, blocks.reshape(2, rows // 2, -1), chosen)[:, 0], of_two))
    return worst


# ---- sampling -----------------------------------------------------------------------------------------------------------


def sampling_works(kernels: SamplingKernels, vocabulary: int) -> bool:
    """The cut of top-k, top-p and both. The error is that of the least logit, and of how many of it are kept."""

    def attempt() -> float:
        numbers = np.random.default_rng(30).permutation(np.linspace(-9, 3, vocabulary, dtype=np.float32))
        x = mx.array(np.stack([numbers, numbers[::-1], np.round(numbers)]))
        cold = mx.array([[1.0], [0.5], [2.0]])
        count, top_p = np.array([vocabulary // 2, vocabulary, vocabulary // 3]), np.array([1, 0.7, 0.83], np.float32)
        asked = x, x.max(axis=1, keepdims=True), cold, count, top_p
        (least, ties), (right, as_many) = kernels.least_kept(*asked), least_kept(*asked, vocabulary)
        few = mx.abs(ties - as_many) > mx.maximum(1, as_many // 1000)          # sums are rounded in another order
        return float(mx.maximum(mx.abs(least - right).max(), few.any()))

    return works("sampling", attempt, TOLERANCES[mx.float32])
