"""The tree of a model's weights on the device, as the spec has it. weights.py fills it, model.py reads it."""

from dataclasses import dataclass

import mlx.core as mx

from backends.mlx.mapping import Mappings
from backends.mlx.matrices import Experts, Matrix

__all__ = ["DenseWeights", "HeadNorms", "LayerWeights", "MixtureWeights", "ModelWeights", "Stack"]


HeadNorms = tuple[mx.array, mx.array] | None
"""The weights of a layer's norms of queries and keys, (hs,) each."""


@dataclass(frozen=True, slots=True)
class Stack:
    """Matrices that read the same input: one if all rest in the same way, else several, in order."""

    rows: int
    matrices: tuple[Matrix, ...]

    def __call__(self, x: mx.array) -> mx.array:
        """(T, K) -> (T, rows), the matrices' results side by side."""
        results = [matrix(x) for matrix in self.matrices]
        return results[0] if len(results) == 1 else mx.concatenate(results, axis=-1)

    @property
    def nbytes(self) -> int:
        return sum(matrix.nbytes for matrix in self.matrices)


@dataclass(frozen=True, slots=True)
class DenseWeights:
    """A gated feed-forward: down(activation(gate x) * up x), gate's rows above up's."""

    gate_up: Stack                       # (2 F, D)
    down: Matrix                         # (D, F)


@dataclass(frozen=True, slots=True)
class MixtureWeights:
    """Experts, who chooses them, and the expert that every token goes to."""

    router: Matrix                       # (E, D)
    gate_up: Experts                     # (E, 2 F, D), or (E, F, D) twice
    down: Experts                        # (E, D, F)
    shared: DenseWeights | None
    shared_router: Matrix | None         # (1, D)


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer; a vector that the layer does not have is None. Vectors are of the activations' type."""

    attention_norm: mx.array
    qkv: Stack                           # ((H + 2 KV) hs, D)
    qkv_bias: mx.array | None            # ((H + 2 KV) hs,)
    query_norm: mx.array | None          # (hs,)
    key_norm: mx.array | None
    attention_output: Matrix             # (D, H hs)
    attention_output_bias: mx.array | None
    attention_post_norm: mx.array | None
    feed_norm: mx.array
    feed: DenseWeights | MixtureWeights
    feed_post_norm: mx.array | None

    @property
    def head_norms(self) -> HeadNorms:
        return None if self.query_norm is None or self.key_norm is None else (self.query_norm, self.key_norm)


@dataclass(frozen=True, slots=True)
class ModelWeights:
    dtype: mx.Dtype                      # of the activations
    embedding: Matrix
    layers: tuple[LayerWeights, ...]
    norm: mx.array
    output: Matrix                       # the embedding itself where the two are tied
    nbytes: int
    mappings: Mappings                   # of the files in which arrays lie, kept as long as these
