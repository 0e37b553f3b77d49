"""Native GGUF blocks -> weights, as MLX operations on the device: Blocks in matrices.py uses it for rows of an embedding.

Exact in float32, as gguf.quants has it (tests/mlx/test_matrices.py). Block layouts: ggml's ggml-common.h.
"""

from collections.abc import Callable

import mlx.core as mx

__all__ = ["DEQUANTIZERS", "dequantize_blocks"]


def dequantize_blocks(kind: str, blocks: mx.array, block_bytes: int) -> mx.array:
    """(..., bytes of a row) uint8 -> (..., columns) float32. kind: a key of DEQUANTIZERS."""
    *outer, row_bytes = blocks.shape
    per_row = row_bytes // block_bytes
    weights = DEQUANTIZERS[kind](blocks.reshape(-1, block_bytes))
    return weights.reshape(*outer, per_row * weights.shape[-1])


def half(blocks: mx.array, at: int) -> mx.array:
    """The float16 at byte `at` of each block, (n, 1) float32."""
    low, high = blocks[:, at : at + 1].astype(mx.uint16), blocks[:, at + 1 : at + 2].astype(mx.uint16)
    return (low | (high << 8)).view(mx.float16).astype(mx.float32)


def fields(data: mx.array, run: int, bits: int, count: int) -> mx.array:
    """(n, bytes) -> (n, count bytes): of each `run` bytes the lowest `bits` bits, then the next, `count` times."""
    shifts = mx.array([bits * number for number in range(count)], mx.uint8).reshape(1, 1, count, 1)
    taken = (data.reshape(data.shape[0], -1, 1, run) >> shifts) & mx.array((1 << bits) - 1, mx.uint8)
    return taken.reshape(data.shape[0], -1)


def scaled(codes: mx.array, scales: mx.array) -> mx.array:
    """(n, 16, 16) weights of 16 groups; codes (n, 256), scales (n, 16)."""
    return codes.reshape(-1, 16, 16).astype(mx.float32) * scales[:, :, None]


def q2_k(blocks: mx.array) -> mx.array:
    packed, codes = blocks[:, :16], fields(blocks[:, 16:80], 32, 2, 4)
    scales = half(blocks, 80) * (packed & 15).astype(mx.float32)
    minima = half(blocks, 82) * (packed >> 4).astype(mx.float32)
    return (scaled(codes, scales) - minima[:, :, None]).reshape(-1, 256)


def q3_k(blocks: mx.array) -> mx.array:
    codes = fields(blocks[:, 32:96], 32, 2, 4) | (fields(blocks[:, :32], 32, 1, 8) << 2)
    packed = fields(blocks[:, 96:104], 8, 4, 2) | (fields(blocks[:, 104:108], 4, 2, 4) << 4)         # 16 scales of 6 bits
    scales = half(blocks, 108) * (packed.astype(mx.int8) - 32).astype(mx.float32)
    return scaled(codes.astype(mx.int8) - 4, scales).reshape(-1, 256)


def q4_k(blocks: mx.array) -> mx.array:
    return with_minima(fields(blocks[:, 16:144], 32, 4, 2), blocks)


def q5_k(blocks: mx.array) -> mx.array:
    return with_minima(fields(blocks[:, 48:176], 32, 4, 2) | (fields(blocks[:, 16:48], 32, 1, 8) << 4), blocks)


def with_minima(codes: mx.array, blocks: mx.array) -> mx.array:
    """Q4_K and Q5_K begin with two float16 and 12 bytes: 8 scales and 8 minima of 6 bits, the last 4 of each in pieces."""
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    packed = [mx.concatenate([low & 63, (high & 15) | ((low >> 6) << 4)], axis=1)
              for low, high in ((first, third), (second, third >> 4))]  # fmt: skip
    scales, minima = (half(blocks, 2 * at) * one.astype(mx.float32) for at, one in enumerate(packed))
    return (codes.reshape(-1, 8, 32).astype(mx.float32) * scales[:, :, None] - minima[:, :, None]).reshape(-1, 256)


def q6_k(blocks: mx.array) -> mx.array:
    codes = fields(blocks[:, :128], 64, 4, 2) | (fields(blocks[:, 128:192], 32, 2, 4) << 4)
    scales = half(blocks, 208) * blocks[:, 192:208].view(mx.int8).astype(mx.float32)
    return scaled(codes.astype(mx.int8) - 32, scales).reshape(-1, 256)


# ---- blocks of 32 -------------------------------------------------------------------------------------------------------

LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)     # of IQ4_NL and IQ4_XS


def fifth_bits(data: mx.array) -> mx.array:
    """(n, 4) bytes -> their 32 bits, lowest first, each as 16: (n, 32)."""
    bits = (data[:, :, None] >> mx.arange(8, dtype=mx.uint8)) & mx.array(1, mx.uint8)
    return bits.reshape(-1, 32) << 4


def levels(codes: mx.array) -> mx.array:
    return mx.array(LEVELS, mx.float32)[codes]


def q4_0(blocks: mx.array) -> mx.array:
    return half(blocks, 0) * (fields(blocks[:, 2:18], 16, 4, 2).astype(mx.int8) - 8).astype(mx.float32)


def q4_1(blocks: mx.array) -> mx.array:
    return half(blocks, 0) * fields(blocks[:, 4:20], 16, 4, 2).astype(mx.float32) + half(blocks, 2)


def q5_0(blocks: mx.array) -> mx.array:
    codes = fields(blocks[:, 6:22], 16, 4, 2) | fifth_bits(blocks[:, 2:6])
    return half(blocks, 0) * (codes.astype(mx.int8) - 16).astype(mx.float32)


def q5_1(blocks: mx.array) -> mx.array:
    codes = fields(blocks[:, 8:24], 16, 4, 2) | fifth_bits(blocks[:, 4:8])
    return half(blocks, 0) * codes.astype(mx.float32) + half(blocks, 2)


def q8_0(blocks: mx.array) -> mx.array:
    return half(blocks, 0) * blocks[:, 2:34].view(mx.int8).astype(mx.float32)


def iq4_nl(blocks: mx.array) -> mx.array:
    return half(blocks, 0) * levels(fields(blocks[:, 2:18], 16, 4, 2))


def iq4_xs(blocks: mx.array) -> mx.array:
    high = fields(blocks[:, 2:4], 1, 2, 4)                                                        # (n, 8)
    packed = fields(blocks[:, 4:8], 1, 4, 2) | (high << 4)
    scales = half(blocks, 0) * (packed.astype(mx.int8) - 32).astype(mx.float32)
    codes = levels(fields(blocks[:, 8:136], 16, 4, 2)).reshape(-1, 8, 32)
    return (codes * scales[:, :, None]).reshape(-1, 256)


DEQUANTIZERS: dict[str, Callable[[mx.array], mx.array]] = {
    "Q2_K": q2_k, "Q3_K": q3_k, "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k, "Q4_0": q4_0, "Q4_1": q4_1, "Q5_0": q5_0,
    "Q5_1": q5_1, "Q8_0": q8_0, "IQ4_NL": iq4_nl, "IQ4_XS": iq4_xs,
}  # fmt: skip
