"""Every variant of the products with native blocks, as variants.py wants them."""

from collections.abc import Iterator

import mlx.core as mx

from backends.mlx.metal_products import BLOCK_BYTES, BLOCK_WEIGHTS, ProductKernels

__all__ = ["product_calls"]

DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
COLUMNS = (1024, 2048, 4096)             # a row's blocks for one, two and four simdgroups
MANY = 64 * 128                          # rows that fill the GPU: larger tiles


def product_calls() -> Iterator[tuple[str, object]]:
    for kind in BLOCK_BYTES:
        for dtype in DTYPES:
            yield f"{kind} {dtype}", lambda make, of=(kind, dtype): call_products(ProductKernels(make), *of)


def call_products(kernels, kind, dtype):
    """1, 2, 4 and 8 tokens at three widths, tiles of 16 and 32 tokens and of 32 and 64 rows, experts of both."""
    dtype = DTYPES[dtype]

    def shape(*outer, columns=256):
        return mx.zeros((*outer, columns // BLOCK_WEIGHTS[kind] * BLOCK_BYTES[kind]), mx.uint8)

    for columns in COLUMNS:
        for tokens in (1, 2, 4, 8):
            kernels.block_matvec(mx.zeros((tokens, columns), dtype), shape(8, columns=columns), kind)
    for tokens in (16, 32):
        for rows in (8, MANY):
            kernels.block_matmul(mx.zeros((tokens, 256), dtype), shape(rows), kind)
    for own in (False, True):
        for product, tokens in ((kernels.block_expert_matvec, 4), (kernels.block_expert_matmul, 4),
                                (kernels.block_expert_matmul, 80)):  # fmt: skip
            x = mx.zeros((tokens, 2, 256) if own else (tokens, 256), dtype)
            product(x, shape(8, 8), mx.zeros((tokens, 2), mx.int32), kind)
