"""A model's two branches in NumPy, without a context: what a rank adds to the sum. Every tensor of a layer has its part."""

import numpy as np

from engine.model.spec import Dense, Mixture
from engine.weights.tensors import to_float32


def weights_of(source):
    return {name: to_float32(source.tensor(name)) for name in source.names()}


def attention_branch(layer, w, at, x):
    """Something like attention of a token to itself: values, weighed by what its head's query and key say."""
    a = layer.attention

    def heads(name, count):
        return (x @ w[f"{at}{name}"].T + w.get(f"{at}{name}_bias", 0)).reshape(len(x), count, a.head_size)

    query, key, value = heads("query", a.heads), heads("key", a.kv_heads), heads("value", a.kv_heads)
    key, value = (np.repeat(each, a.heads // a.kv_heads, axis=1) for each in (key, value))
    mixed = np.tanh((query * key).sum(2, keepdims=True)) * value
    return mixed.reshape(len(x), -1) @ w[f"{at}attention_output"].T + w.get(f"{at}attention_output_bias", 0)


def feed_branch(layer, w, at, x):
    def gated(prefix):
        gate = x @ w[f"{prefix}gate"].T
        return (gate / (1 + np.exp(-gate)) * (x @ w[f"{prefix}up"].T)) @ w[f"{prefix}down"].T

    match layer.feed_forward:
        case Dense():
            return gated(at)
        case Mixture() as spec:
            scores = np.exp(x @ w[f"{at}router"].T)
            scores /= scores.sum(1, keepdims=True)
            scores[scores < np.sort(scores, 1)[:, [-spec.experts_per_token]]] = 0
            total = sum(scores[:, [e]] * gated(f"{at}experts.{e}.") for e in range(spec.experts))
            if spec.shared_width is not None:
                total = total + gated(f"{at}shared_") / (1 + np.exp(-x @ w[f"{at}shared_router"].T))
            return total
