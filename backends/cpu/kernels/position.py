"""One kernel between the query/key/value projection and attention: biases, q/k norm, rope, and writing the pages.

Keys rest as [pages, layers, kv heads, head size, page tokens] (keys are lanes), values as [pages, layers, kv heads, page
tokens, head size]: a page is one piece of memory, so that the cache grows in memory only as pages are used.
"""

import numpy as np
from numba import prange
from numpy.typing import NDArray

from backends.cpu.kernels.jit import inner, kernel, signed

__all__ = ["rotate_and_write"]

Floats = NDArray[np.float32]
ZERO = np.float32(0)


@inner
def head_norm(qkv: Floats, t: int, start: int, weight: Floats, epsilon: np.float32) -> None:
    total = np.float32(0)
    size = weight.shape[0]
    for i in range(size):
        total += qkv[t, start + i] * qkv[t, start + i]
    scale = np.float32(1) / np.sqrt(total / np.float32(size) + epsilon)
    for i in range(size):
        qkv[t, start + i] = qkv[t, start + i] * scale * weight[i]


@inner
def rotate(qkv: Floats, t: int, start: int, cosine: Floats, sine: Floats, interleaved: bool) -> None:
    half = cosine.shape[1]
    step, distance = (2, 1) if interleaved else (1, half)
    for i in range(half):
        first = start + step * i
        a, b = qkv[t, first], qkv[t, first + distance]
        qkv[t, first] = a * cosine[t, i] - b * sine[t, i]
        qkv[t, first + distance] = b * cosine[t, i] + a * sine[t, i]


@inner
def write(qkv: Floats, t: int, heads: int, slot: int, keys: Floats, values: Floats, layer: int) -> None:
    kv_heads, size, page_tokens = keys.shape[2], keys.shape[3], keys.shape[4]
    page, offset = slot // page_tokens, slot % page_tokens
    for h in range(kv_heads):
        key, value = (heads + h) * size, (heads + kv_heads + h) * size
        for i in range(size):
            keys[page, layer, h, i, offset] = qkv[t, key + i]
            values[page, layer, h, offset, i] = qkv[t, value + i]


@inner
def clear_rest(slots: NDArray[np.int64], t: int, values: Floats, layer: int) -> None:
    """Behind the last of a row's tokens in a page that they began: no weight of 0 may meet what another sequence left there,
    which need not be finite. Pages that were begun earlier are clear already."""
    page_tokens = values.shape[3]
    slot = slots[t]
    page, offset = slot // page_tokens, slot % page_tokens
    goes_on = t + 1 < slots.shape[0] and slots[t + 1] == slot + 1 and offset + 1 < page_tokens
    if not goes_on and t >= offset and slots[t - offset] == slot - offset:
        for h in range(values.shape[2]):
            for rest in range(offset + 1, page_tokens):
                for i in range(values.shape[4]):
                    values[page, layer, h, rest, i] = ZERO


@inner
def position_row(
    qkv: Floats, bias: Floats, query_norm: Floats, key_norm: Floats, epsilon: np.float32, cosine: Floats, sine: Floats,
    interleaved: bool, slots: NDArray[np.int64], keys: Floats, values: Floats, layer: int, t: int,
) -> None:
    kv_heads, size = keys.shape[2], keys.shape[3]
    heads = qkv.shape[1] // size - 2 * kv_heads
    for i in range(bias.shape[0]):
        qkv[t, i] += bias[i]
    for h in range(heads + kv_heads):
        norm = query_norm if h < heads else key_norm
        if norm.shape[0] > 0:
            head_norm(qkv, t, h * size, norm, epsilon)
        rotate(qkv, t, h * size, cosine, sine, interleaved)
    write(qkv, t, heads, slots[t], keys, values, layer)
    clear_rest(slots, t, values, layer)


@kernel
def rotate_and_write(
    qkv: Floats,                    # (T, (heads + 2 kv heads) size), changed in place
    bias: Floats,                   # (columns of qkv,), or empty
    query_norm: Floats,             # (size,), or empty
    key_norm: Floats,
    epsilon: np.float32,
    cosine: Floats,                 # (T, rotary size / 2)
    sine: Floats,
    interleaved: bool,
    slots: NDArray[np.int64],       # (T,)
    keys: Floats,
    values: Floats,
    layer: int,
) -> None:
    if slots.shape[0] == 1:                # a launch of threads would take longer
        position_row(
            qkv, bias, query_norm, key_norm, epsilon, cosine, sine, interleaved, slots, keys, values, layer,
            slots.shape[0] - 1,
        )  # fmt: skip
    else:
        for token in prange(slots.shape[0]):
            position_row(
                qkv, bias, query_norm, key_norm, epsilon, cosine, sine, interleaved, slots, keys, values, layer, signed(token)
            )  # fmt: skip
