"""Products with GGUF blocks as the file has them, as Metal kernels: for few tokens, for many, and for choices of experts.

weights.py gives a BlockProduct to each type that rests in its blocks; Blocks and BlockExperts call it. Kernels are made when
they are first run, on the device thread. They must never see blocks that were not checked against their shape: they read
what the shape says.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from backends.mlx.metal_library import Constant, KernelLibrary, MakeKernel
from engine.errors import ConfigError

__all__ = ["BLOCK_BYTES", "BLOCK_WEIGHTS", "MOST_TOKENS", "BlockProduct", "ProductKernels"]

KINDS = {"Q2_K": 2, "Q3_K": 3, "Q4_K": 4, "Q5_K": 5, "Q6_K": 6, "Q4_0": 40, "Q4_1": 41, "Q5_0": 50, "Q5_1": 51, "Q8_0": 80,
         "IQ4_NL": 90, "IQ4_XS": 91}  # fmt: skip
BLOCK_BYTES = {"Q2_K": 84, "Q3_K": 110, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210, "Q4_0": 18, "Q4_1": 20, "Q5_0": 22,
               "Q5_1": 24, "Q8_0": 34, "IQ4_NL": 18, "IQ4_XS": 136}  # fmt: skip
BLOCK_WEIGHTS = {kind: 256 if size > 34 else 32 for kind, size in BLOCK_BYTES.items()}
MOST_TOKENS = 8              # that a matvec takes
SORTED_PER_EXPERT = 4        # choices, from which on tiles beat a product per choice
MANY_GROUPS = 128            # threadgroups that fill the GPU, so that larger tiles pay
FLOATS = (mx.float16, mx.bfloat16, mx.float32)


class ProductKernels:
    """Products with native blocks. `make_kernel` is mx.fast.metal_kernel, but for tests."""

    def __init__(self, make_kernel: MakeKernel | None = None) -> None:
        self.library = KernelLibrary(make_kernel)
        self._nothing: mx.array | None = None

    def block_matvec(self, x: mx.array, blocks: mx.array, kind: str) -> mx.array:
        """x (M, K) times the transpose of blocks (N, bytes of a row) uint8 -> (M, N), x's dtype, M from 1 to 8.

        Sums are float32. kind is a key of BLOCK_BYTES. Raises ConfigError for what has no kernel.
        """
        check(x, blocks, kind, 2)
        tokens = x.shape[0]
        if tokens > MOST_TOKENS:
            raise ConfigError(f"x has shape {x.shape}, it must be (1 to {MOST_TOKENS} tokens, K): use block_matmul for more")
        return self._matvec(x, blocks, self._unused(), kind, tokens=tokens, shared=0, lines=1)

    def block_matmul(self, x: mx.array, blocks: mx.array, kind: str) -> mx.array:
        """As block_matvec for any number of tokens; it reads the blocks once for every 32 of them."""
        check(x, blocks, kind, 2)
        unused = self._unused()
        tokens = tile_tokens(x.shape[0])
        return self._matmul(x, blocks, unused, unused, kind, tokens=tokens, tiles=-(-x.shape[0] // tokens), lines=x.shape[0])

    def block_expert_matvec(self, x: mx.array, blocks: mx.array, chosen: mx.array, kind: str) -> mx.array:
        """A product for each choice, at any number of them: x (T, K), or (T, k, K) for an input per choice,
        blocks (E, N, bytes of a row), chosen (T, k) int32 from 0 to E - 1 -> (T, k, N), x's dtype."""
        check(x, blocks, kind, 3)
        choices = check_choices(x, chosen)
        out = self._matvec(x, blocks, chosen.reshape(-1), kind, tokens=1, shared=sharing(x, chosen), lines=choices)
        return out.reshape(*chosen.shape, -1)

    def block_expert_matmul(self, x: mx.array, blocks: mx.array, chosen: mx.array, kind: str) -> mx.array:
        """As block_expert_matvec; choices are sorted, so that an expert's blocks are read once for every 32 that want it."""
        check(x, blocks, kind, 3)
        choices, experts = check_choices(x, chosen), blocks.shape[0]
        flat = chosen.reshape(-1)
        order = mx.argsort(flat).astype(mx.int32)
        starts = (flat[:, None] < mx.arange(experts + 1, dtype=flat.dtype)).sum(axis=0).astype(mx.int32)     # (E + 1,)
        tokens = tile_tokens(choices // experts)
        out = self._matmul(
            x, blocks, order, starts, kind, tokens=tokens, tiles=choices // tokens + experts, lines=choices,
            shared=sharing(x, chosen),
        )  # fmt: skip
        return out.reshape(*chosen.shape, -1)

    def _matvec(
        self, x: mx.array, blocks: mx.array, chosen: mx.array, kind: str, *, tokens: int, shared: int, lines: int
    ) -> mx.array:
        """lines: products, of `tokens` tokens each."""
        count = -(-x.shape[-1] // 256)
        rows = 4 if tokens <= 4 else 2                               # what the registers hold
        parts = 1 if count <= 4 else 2 if count <= 12 else 4
        constants: Mapping[str, Constant] = {
            "T": x.dtype, "KIND": KINDS[kind], "M": tokens, "ROWS": rows, "PARTS": parts, "SHARED": shared
        }  # fmt: skip
        (out,) = self.library.run(
            "block_matvec",
            {"x": x, "blocks": blocks, "chosen": chosen},
            {"out": ((tokens * lines, blocks.shape[-2]), x.dtype)},
            constants,
            groups=(-(-blocks.shape[-2] // (rows * 4 // parts)), lines, 1),
            threads=128,
        )
        return out

    def _matmul(
        self, x: mx.array, blocks: mx.array, order: mx.array, starts: mx.array, kind: str, *, tokens: int, tiles: int,
        lines: int, shared: int = 0,
    ) -> mx.array:  # fmt: skip
        """tokens: of a tile, tiles: of tokens, lines: of the result."""
        count = blocks.shape[-2]
        rows = 64 if -(-count // 64) * tiles >= MANY_GROUPS else 32
        constants: Mapping[str, Constant] = {
            "T": x.dtype, "KIND": KINDS[kind], "ROWS": rows, "TOKENS": tokens, "SHARED": shared
        }  # fmt: skip
        (out,) = self.library.run(
            "block_matmul",
            {"x": x, "blocks": blocks, "order": order, "starts": starts},
            {"out": ((lines, count), x.dtype)},
            constants,
            groups=(tiles, -(-count // rows), 1),
            threads=2 * rows,
        )
        return out

    def _unused(self) -> mx.array:
        """What a kernel is given in the place of an input that it does not read; made on the device thread."""
        if self._nothing is None:
            self._nothing = mx.zeros(8, mx.int32)
        return self._nothing


@dataclass(frozen=True, slots=True)
class BlockProduct:
    """The products with blocks of one type, each by the kernel that suits the number of tokens: matrices.Product."""

    kernels: ProductKernels
    kind: str                        # a key of BLOCK_BYTES

    def __call__(self, x: mx.array, blocks: mx.array) -> mx.array:
        """x (T, K), blocks (N, bytes of a row) -> (T, N), of x's type."""
        few = x.shape[0] <= MOST_TOKENS
        return (self.kernels.block_matvec if few else self.kernels.block_matmul)(x, blocks, self.kind)

    def by_choice(self, x: mx.array, blocks: mx.array, chosen: mx.array) -> mx.array:
        """x (T, K) or (T, k, K), blocks (E, N, bytes of a row), chosen (T, k) -> (T, k, N), of x's type."""
        few = chosen.size < SORTED_PER_EXPERT * blocks.shape[0]
        product = self.kernels.block_expert_matvec if few else self.kernels.block_expert_matmul
        return product(x, blocks, chosen, self.kind)


def check(x: mx.array, blocks: mx.array, kind: str, axes: int) -> None:
    """Raises ConfigError unless x and blocks (of `axes` axes) fit each other and a kernel."""
    if kind not in BLOCK_BYTES:
        raise ConfigError(f"{kind} has no Metal product of native blocks, it must be one of {', '.join(BLOCK_BYTES)}")
    if x.dtype not in FLOATS or blocks.dtype != mx.uint8:
        raise ConfigError(f"x is {x.dtype} and blocks {blocks.dtype}, they must be floats and uint8")
    if not 2 <= x.ndim <= axes or not x.size:
        raise ConfigError(f"x has shape {x.shape}, it must be (1 token or more, K)")
    columns = x.shape[-1]
    weights = BLOCK_WEIGHTS[kind]
    row_bytes = columns // weights * BLOCK_BYTES[kind]
    if columns % weights or blocks.ndim != axes or not blocks.size or blocks.shape[-1] != row_bytes:
        shape = "(N, " if axes == 2 else "(E, N, "
        raise ConfigError(f"blocks have shape {blocks.shape}, for x {x.shape} they must be {shape}{row_bytes})")


def check_choices(x: mx.array, chosen: mx.array) -> int:
    """How many choices there are. Raises ConfigError unless they fit x."""
    fits = chosen.ndim == 2 and chosen.size and (x.shape[:-1] == chosen.shape if x.ndim == 3 else len(x) == len(chosen))
    if not fits or chosen.dtype not in (mx.int32, mx.uint32):
        raise ConfigError(f"chosen has shape {chosen.shape} of {chosen.dtype}, for x {x.shape} it must be (T, k) int32")
    return chosen.size


def sharing(x: mx.array, chosen: mx.array) -> int:
    """How many choices read the same row of x."""
    return chosen.shape[1] if x.ndim == 2 else 1


def tile_tokens(tokens: int) -> int:
    """Of a tile for so many: those beyond it cost as much as real ones."""
    return 16 if tokens <= 16 else 32
