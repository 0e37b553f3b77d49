"""Mixture of experts: who goes to which expert, in which order, and the sum of the answers: launches of mixture.cu.

ops.py calls route(), the grouped products read its result from the device, combine() adds up. A token's result does not
depend on which other tokens are in the step. Nothing here waits.
"""

from dataclasses import dataclass

import numpy as np

from backends.cuda.device import Array, Device, Kernel, Stream, make_array
from backends.cuda.elementwise import rows_geometry, vector
from engine.errors import UnsupportedModel
from engine.model.spec import Mixture

__all__ = ["Routing", "RoutingRoom", "combine", "mixture_kernels", "most_tiles", "refuse_mixture", "route"]

CHUNK = 32                       # tokens of a block, as in mixture.cu
CHUNK_THREADS = 1024
MOST_EXPERTS, MOST_EACH = 512, 32
ROUTE_SHARED = 5 * MOST_EXPERTS * 4 + 16
GROUP = Kernel("mixture.cu", "group")
ABSENT = 0


@dataclass(frozen=True, slots=True)
class Routing:
    """Where a step's tokens go, on the device. A position is a place in the list of (token, expert) ordered by expert, and
    within one by token; grouped products have a row per position."""

    experts: Array               # (T, k) i32, of a token in ascending order
    shares: Array                # (T, k) f32, what their answers are weighed by
    place: Array                 # (T, k) i32, their positions
    source: Array                # (T k,) i32, position -> token
    tiles: Array                 # (n, 3) i32: expert, first position, count; n depends on T, unused ones have count 0
    tile_tokens: int             # the largest count


@dataclass(frozen=True, slots=True)
class RoutingRoom:
    """Memory for the routing of any step."""

    spec: Mixture
    experts: Array
    shares: Array
    place: Array
    source: Array
    tiles: Array
    chosen: Array                # (chunks, E) u32: bit t of a word says that token t of the chunk goes to the expert

    @classmethod
    def make(cls, device: Device, spec: Mixture, most_tokens: int, least_tile_tokens: int) -> "RoutingRoom":
        """least_tile_tokens: of all that route() is called with."""
        each = spec.experts_per_token
        tiles = max(most_tiles(tokens, spec, least_tile_tokens) for tokens in (1, most_tokens))
        return cls(
            spec, make_array(device, "i32", most_tokens, each), make_array(device, "f32", most_tokens, each),
            make_array(device, "i32", most_tokens, each), make_array(device, "i32", most_tokens * each),
            make_array(device, "i32", tiles, 3), make_array(device, "u32", chunks(most_tokens), spec.experts),
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (self.experts, self.shares, self.place, self.source, self.tiles, self.chosen))

    def of(self, tokens: int, tile_tokens: int) -> Routing:
        """The part of it that a step of so many tokens writes."""
        tiles = most_tiles(tokens, self.spec, tile_tokens)
        return Routing(
            self.experts.first(tokens), self.shares.first(tokens), self.place.first(tokens),
            self.source.first(tokens * self.spec.experts_per_token), self.tiles.first(tiles), tile_tokens,
        )  # fmt: skip


def most_tiles(tokens: int, spec: Mixture, tile_tokens: int) -> int:
    """The most tiles that so many tokens can need: every expert that is chosen has one that may be nearly empty."""
    positions = tokens * spec.experts_per_token
    return (positions + min(spec.experts, positions) * (tile_tokens - 1)) // tile_tokens


def refuse_mixture(spec: Mixture) -> None:
    """Raise UnsupportedModel for what mixture.cu has no room for."""
    if spec.experts > MOST_EXPERTS or spec.experts_per_token > min(MOST_EACH, spec.experts):
        raise UnsupportedModel(
            f"a mixture has {spec.experts} experts and {spec.experts_per_token} per token, the cuda backend has room for "
            f"{MOST_EXPERTS} and {MOST_EACH}: choose another model, or --backend cpu"
        )


def mixture_kernels(spec: Mixture, hidden_size: int) -> list[Kernel]:
    return [route_kernel(spec), GROUP, combine_kernel(hidden_size)]


def route(stream: Stream, logits: Array, room: RoutingRoom, tile_tokens: int) -> Routing:
    """logits (T, E) f32 -> each token's most probable experts (ties to the lowest), their shares of the softmax over all
    experts or, with normalize_top_k, over the chosen ones, and the order for grouped products in tiles of tile_tokens."""
    tokens, experts = logits.shape
    spec = room.spec
    assert experts == spec.experts, (logits, spec)
    routing = room.of(tokens, tile_tokens)
    shape = (
        np.int32(tokens), np.int32(experts), np.int32(spec.experts_per_token), np.int32(tile_tokens),
        np.int32(routing.tiles.shape[0]),
    )  # fmt: skip
    made = (routing.source, routing.place, routing.tiles)
    grid = (chunks(tokens), 1, 1)
    stream.launch(
        route_kernel(spec), grid, CHUNK_THREADS, ROUTE_SHARED, logits, routing.experts, routing.shares, room.chosen,
        *made, *shape,
    )  # fmt: skip
    if grid[0] > 1:
        stream.launch(GROUP, grid, CHUNK_THREADS, ROUTE_SHARED, routing.experts, room.chosen, *made, *shape)
    return routing


def combine(
    stream: Stream, answers: Array, routing: Routing, out: Array, shared: Array | None = None,
    shared_logits: Array | None = None,
) -> None:  # fmt: skip
    """out (T, D) = sum over a token's experts, in ascending order, of share x answer, + sigmoid(shared_logits) x shared.

    answers (T k, D) by position, shared (T, D), shared_logits (T, 1) or (T,) f32; all but the logits bf16."""
    tokens, columns = out.shape
    each = routing.place.shape[1]
    assert answers.shape == (tokens * each, columns), (answers, out, each)
    assert (shared is None) == (shared_logits is None), "a shared expert has an answer and a logit"
    assert shared is None or shared.shape == out.shape, (shared, out)
    grid, threads = rows_geometry(tokens, columns, 8)
    stream.launch(
        combine_kernel(columns), grid, threads, 0, answers, routing.place, routing.shares, shared or ABSENT,
        shared_logits or ABSENT, out, np.int32(each), np.int32(columns),
    )  # fmt: skip


def route_kernel(spec: Mixture) -> Kernel:
    per_lane = 4 if spec.experts <= 128 else 16
    return Kernel("mixture.cu", f"route<{str(spec.normalize_top_k).lower()}, {per_lane}>")


def combine_kernel(columns: int) -> Kernel:
    return Kernel("mixture.cu", f"combine<{vector(columns, 8)}>")


def chunks(tokens: int) -> int:
    return -(-tokens // CHUNK)
