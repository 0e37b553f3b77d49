"""Small steps as one Metal kernel each: a sum and its norm, a gate and its activation, rope and cache write, copies of pages.

ops.py and metal_cache.py call it on a Mac. Kernels and small constants are made at their first use, on the device thread.
It must never keep a pool: who calls gives it for one call, and orders readers by the token.
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from backends.mlx.metal import PAGE, LayerPools
from backends.mlx.metal_library import KernelLibrary, MakeKernel
from engine.errors import ConfigError
from engine.model.spec import Activation

__all__ = ["NormKernels", "RopeTable", "rope_table"]


@dataclass(frozen=True, slots=True)
class RopeTable:
    """What rope_and_write turns by: frequencies as parts of a turn, numbers turned, factor of cosines, order of pairs."""

    turns: mx.array                   # (8 or more,) uint32: high and low half of each frequency's turns times 2^64
    rotary_size: int
    stretch: float
    halves: bool


def rope_table(frequencies: NDArray[np.float64], stretch: float = 1.0, *, halves: bool) -> RopeTable:
    """frequencies (rotary size / 2,) in radians for each position, already scaled, in float64; call on the device thread."""
    turns = np.asarray(frequencies, np.float64) / (2 * np.pi) % 1.0 * 2.0**32
    high = np.minimum(np.floor(turns), 2.0**32 - 1)
    low = np.minimum(np.floor((turns - high) * 2.0**32), 2.0**32 - 1)
    both = np.stack([high, low], -1).astype(np.uint32).reshape(-1)
    padded = np.concatenate([both, np.zeros(max(0, 8 - both.size), np.uint32)])
    return RopeTable(mx.array(padded), 2 * len(turns), stretch, halves)


class NormKernels:
    """Sums, norms, activations, rope and copies. `make_kernel` is mx.fast.metal_kernel, but for tests."""

    def __init__(self, make_kernel: MakeKernel | None = None) -> None:
        self.library = KernelLibrary(make_kernel)
        self._scalars: dict[float, mx.array] = {}
        self._unused: mx.array | None = None

    def add_rms_norm(self, x: mx.array, y: mx.array, weight: mx.array, epsilon: float) -> tuple[mx.array, mx.array]:
        """x, y (T, width) of one dtype, weight (width,) -> (x + y, its RMS norm times weight), both (T, width)."""
        if x.shape != y.shape or x.dtype != y.dtype or x.ndim != 2 or weight.shape != x.shape[1:] or x.shape[1] < 8:
            raise ConfigError(f"x {x.shape} {x.dtype}, y {y.shape} {y.dtype}, weight {weight.shape}: they must be (T, width) "
                              "twice of one dtype and (width,), width 8 or more")  # fmt: skip
        tokens, width = x.shape
        residual, normed = self.library.run(
            "add_rms_norm",
            {"x": x, "y": y, "weight": weight, "epsilon": self._scalar(epsilon)},
            {"residual": (x.shape, x.dtype), "normed": (x.shape, x.dtype)},
            {"T": x.dtype, "WIDTH": width},
            groups=(tokens, 1, 1),
            threads=32 * min(32, -(-width // 128)),
        )
        return residual, normed

    def gated(self, gate_up: mx.array, activation: Activation) -> mx.array:
        """activation(gate) * up of (..., 2 F), gate's numbers first: (..., F)."""
        width = gate_up.shape[-1] // 2
        if gate_up.shape[-1] % 2 or gate_up.size < 8:
            raise ConfigError(f"gate_up {gate_up.shape}: it must be (..., 2 F) and have 8 numbers or more")
        rows = gate_up.reshape(-1, 2 * width)
        threads = 32 * min(8, -(-width // 128))
        (out,) = self.library.run(
            "gated",
            {"gate_up": rows},
            {"out": ((len(rows), width), rows.dtype)},
            {"T": rows.dtype, "GELU": activation == "gelu_tanh"},
            groups=(-(-width // (4 * threads)), len(rows), 1),
            threads=threads,
        )
        return out.reshape(*gate_up.shape[:-1], width)

    def copy_pages(self, pools: LayerPools, pairs: mx.array) -> mx.array:
        """Copy pages (source, target), pairs (4 or more, 2) int32, within the pools in place; -1 is for padding.

        No target may be in another pair. Returns the token (1,) that readers of the pools take.
        """
        if pairs.ndim != 2 or pairs.shape[1] != 2 or len(pairs) < 4:
            raise ConfigError(f"pairs of pages {pairs.shape}: they must be (4 or more, 2), pad them with -1")
        page_bytes = PAGE * pools.keys.shape[1] * pools.keys.shape[2] * pools.keys.itemsize
        (token,) = self.library.run(
            "copy_pages",
            {"pairs": pairs, **self._pools(pools)},
            {"token": ((1,), mx.float32)},
            {"C": pools.keys.dtype},
            groups=(-(-page_bytes // (16 << 10)), len(pairs), 2 if pools.key_scales is None else 4),
            threads=256,
        )
        return token

    def rope_and_write(
        self,
        qkv: mx.array,
        pools: LayerPools,
        positions: mx.array,
        slots: mx.array,
        table: RopeTable,
        norms: tuple[mx.array, mx.array] | None = None,
        epsilon: float = 1e-6,
    ) -> tuple[mx.array, mx.array]:
        """Norm (if norms are (q's weight, k's weight), each (D,)) and turn queries and keys of qkv (T, H + 2 KV, D); write
        keys and values to their slots of the pools in place. positions, slots (T or more,) int32.

        -> (queries turned (T, H, D), token (1,) that readers of the pools take).
        """
        tokens, both, head_size = qkv.shape
        kv_heads = pools.keys.shape[1]
        heads = both - 2 * kv_heads
        if heads < 1 or pools.keys.shape[2] != head_size or table.rotary_size > head_size:
            raise ConfigError(
                f"pools {pools.keys.shape} and a rotary size of {table.rotary_size} do not fit qkv {qkv.shape}: "
                "make them by the model's own heads"
            )
        if min(positions.size, slots.size) < tokens:
            raise ConfigError(f"{positions.size} positions, {slots.size} slots for {tokens} tokens: give each token both")
        if any(weight.shape != (head_size,) for weight in norms or ()):
            raise ConfigError(f"norms have a shape other than ({head_size},): give a weight for each number")
        group = min(8, tokens * (heads + kv_heads))
        q_weight, k_weight = norms or (self._nothing, self._nothing)
        turned, token = self.library.run(
            "rope_write",
            {
                "qkv": qkv,
                "positions": _padded(positions, 0),
                "slots": _padded(slots, -1),
                "table": table.turns,
                "stretch": self._scalar(table.stretch),
                "q_weight": q_weight,
                "k_weight": k_weight,
                "epsilon": self._scalar(epsilon),
                **self._pools(pools),
            },
            {"turned": ((tokens, heads, head_size), qkv.dtype), "token": ((1,), mx.float32)},
            {
                "T": qkv.dtype,
                "C": pools.keys.dtype,
                "H": heads,
                "KV": kv_heads,
                "D": head_size,
                "ROTARY": table.rotary_size,
                "HALVES": table.halves,
                "NORM": norms is not None,
                "GROUP": group,
            },
            groups=(-(-tokens * (heads + kv_heads) // group), 1, 1),
            threads=32 * group,
        )
        return turned, token

    @property
    def _nothing(self) -> mx.array:
        if self._unused is None:
            self._unused = mx.zeros((8, 1))
        return self._unused

    def _pools(self, pools: LayerPools) -> dict[str, mx.array]:
        return {
            "key_pool": pools.keys,
            "value_pool": pools.values,
            "key_scales": self._nothing if pools.key_scales is None else pools.key_scales,
            "value_scales": self._nothing if pools.value_scales is None else pools.value_scales,
        }

    def _scalar(self, value: float) -> mx.array:
        if value not in self._scalars:
            self._scalars[value] = mx.array(value, mx.float32)
        return self._scalars[value]


def _padded(numbers: mx.array, value: int) -> mx.array:
    """At least 8 entries: MLX puts smaller arrays into another address space, where kernels do not compile."""
    return numbers if numbers.size >= 8 else mx.pad(numbers, [(0, 8 - numbers.size)], constant_values=value)
