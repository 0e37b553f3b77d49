"""Sharded tensors put together again are the whole, and what the ranks add up to is what one device computes."""

import logging
from dataclasses import replace

import numpy as np
import pytest

from backends.cuda.bfloat16 import from_bfloat16, to_bfloat16
from backends.cuda.sharding import ShardedSource
from engine.errors import BadModelFile, UnsupportedModel
from engine.model.spec import Attention, Dense, Layer, Mixture, ModelSpec, Rope
from engine.weights.tensors import STORAGE, RawTensor, to_float32
from tests.cuda.branches import attention_branch, feed_branch, weights_of
from tests.support.tiny_checkpoints import config_of, from_folder

FAMILIES = ["llama", "llama_bias", "mistral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "qwen3_moe_mixed", "glm4"]


class RandomSource:
    """Random bytes in the shapes of a spec; `kinds` of what ends on these names, else F32."""

    def __init__(self, spec, **kinds):
        self.shapes, self.kinds, self.released = spec.shapes(), kinds, []

    def names(self):
        return list(self.shapes)

    def tensor(self, name):
        storage = STORAGE[self.kinds.get(name.rpartition(".")[2], "F32")]
        shape = self.shapes[name]
        size = int(np.prod(shape)) // storage.block * storage.bytes
        data = np.random.default_rng(len(name) + size).integers(0, 256, size, np.uint8)
        return RawTensor(name, shape, storage, data, "random")

    def release(self, name):
        self.released.append(name)


def a_spec(feed=None, *, heads=4, kv_heads=2, head_size=8, hidden=8, bias=False):
    attention = Attention(heads, kv_heads, head_size, 1.0, Rope(1e4, head_size, False), qkv_bias=bias, output_bias=bias)
    return ModelSpec("test", 16, hidden, (Layer(attention, feed or Dense(64)),), 1e-6, True, 64)


def shards(spec, source, ranks):
    return [ShardedSource(source, spec, rank, ranks) for rank in range(ranks)]


def parts(spec, source, ranks, name):
    with np.errstate(all="ignore"):                      # random bytes have scales that are not finite
        return [shard.tensor(name) for shard in shards(spec, source, ranks)]


def values(tensor):
    with np.errstate(all="ignore"):
        return to_float32(tensor)


def rows_of(tensor):
    return tensor.data.reshape(tensor.rows, tensor.row_bytes)


@pytest.mark.parametrize("kind", STORAGE)
def test_columns_cut_where_blocks_end_are_the_files_own_bytes(kind):
    block = STORAGE[kind].block
    width = 6 * block * (1 if block >= 8 else 16)
    spec = a_spec(Dense(width), heads=6, kv_heads=3)
    source = RandomSource(spec, down=kind)
    whole = source.tensor("layers.0.down")
    cut = parts(spec, source, 3, "layers.0.down")
    assert {part.storage.name for part in cut} == {kind}
    assert [part.shape for part in cut] == [(8, width // 3)] * 3
    assert np.array_equal(np.concatenate([rows_of(part) for part in cut], axis=1), rows_of(whole))
    assert [shard.spec.layers[0].feed_forward.width for shard in shards(spec, source, 3)] == [width // 3] * 3


def test_a_width_of_three_blocks_is_cut_into_one_and_two_for_all_that_read_it():
    spec = a_spec(Mixture(2, 1, 768, False, shared_width=512), hidden=256)
    source = RandomSource(spec, down="Q6_K", gate="Q4_K", shared_down="Q4_K")
    first, second = shards(spec, source, 2)
    assert [s.spec.layers[0].feed_forward.width for s in (first, second)] == [256, 512]
    assert [s.spec.layers[0].feed_forward.shared_width for s in (first, second)] == [256, 256]
    for shard in (first, second):
        for name, shape in shard.spec.shapes().items():
            assert shard.tensor(name).shape == shape, name
    assert second.tensor("layers.0.experts.1.down").storage.name == "Q6_K"


def test_what_is_stored_in_smaller_blocks_in_one_layer_is_cut_as_in_the_others():
    spec = a_spec(Dense(768))
    spec = replace(spec, layers=spec.layers * 2)
    source = RandomSource(spec, down="Q4_K")
    whole = source.tensor
    source.tensor = lambda name: RandomSource(spec, down="Q8_0").tensor(name) if name == "layers.1.down" else whole(name)
    for shard, width in zip(shards(spec, source, 2), (256, 512), strict=True):
        assert [layer.feed_forward.width for layer in shard.spec.layers] == [width] * 2
        assert shard.tensor("layers.1.down").shape == (8, width)


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "IQ4_XS", "Q2_K"])
def test_fewer_blocks_than_ranks_become_bfloat16_with_one_log_line(kind, caplog):
    spec = a_spec(Dense(768))
    source = RandomSource(spec, down=kind)
    with caplog.at_level(logging.INFO):
        cut = parts(spec, source, 4, "layers.0.down")
    assert [part.storage.name for part in cut] == ["BF16"] * 4
    assert [part.shape for part in cut] == [(8, 192)] * 4
    together = np.concatenate([values(part) for part in cut], axis=1)
    whole = values(source.tensor("layers.0.down"))
    np.testing.assert_array_equal(together, from_bfloat16(to_bfloat16(whole)))
    assert len(caplog.records) == 1
    assert f"down ({kind})" in caplog.text


def test_heads_that_end_within_a_block_make_the_attention_output_bfloat16():
    spec = a_spec(heads=4, kv_heads=4, head_size=64, hidden=256)
    source = RandomSource(spec, attention_output="Q4_K")
    cut = parts(spec, source, 2, "layers.0.attention_output")
    together = np.concatenate([values(part) for part in cut], axis=1)
    whole = values(source.tensor("layers.0.attention_output"))
    np.testing.assert_array_equal(together, from_bfloat16(to_bfloat16(whole)))


def test_rows_are_views_and_copies_go_when_they_are_released():
    spec = a_spec(Dense(64))
    data = {name: RandomSource(spec).tensor(name) for name in spec.shapes()}
    source = RandomSource(spec)
    source.tensor = data.__getitem__
    shard = ShardedSource(source, spec, 1, 2)
    assert np.shares_memory(shard.tensor("layers.0.gate").data, data["layers.0.gate"].data)
    assert shard.tensor("layers.0.down") is shard.tensor("layers.0.down")
    shard.release("layers.0.down")
    assert not shard.made
    assert source.released == ["layers.0.down"]


@pytest.mark.parametrize("ranks", [2, 4])
def test_heads_go_to_ranks_together_with_the_key_heads_that_they_read(ranks):
    spec = a_spec(heads=8, kv_heads=2, head_size=4, bias=True)
    source = RandomSource(spec)
    for rank, shard in enumerate(shards(spec, source, ranks)):
        attention = shard.spec.layers[0].attention
        assert (attention.heads, attention.kv_heads) == (8 // ranks, 1)
        for name, count, first in (("query", 8 // ranks, rank * 8 // ranks), ("key", 1, rank * 2 // ranks)):
            for suffix in ("", "_bias"):
                whole = values(source.tensor(f"layers.0.{name}{suffix}"))
                wanted = whole[first * 4 : (first + count) * 4]
                np.testing.assert_array_equal(values(shard.tensor(f"layers.0.{name}{suffix}")), wanted)


def test_the_output_bias_is_added_by_the_first_rank_alone():
    spec = a_spec(bias=True)
    source = RandomSource(spec, attention_output_bias="F16")
    first, second = parts(spec, source, 2, "layers.0.attention_output_bias")
    assert np.array_equal(first.data, source.tensor("layers.0.attention_output_bias").data)
    assert not to_float32(second).any()
    assert second.shape == first.shape


@pytest.mark.parametrize(("spec", "ranks", "says"), [
    (a_spec(heads=9, kv_heads=3), 2, r"9 heads with 3 key/value heads.*2 devices: name as many as one of 1, 3, 9 with --d"),
    (a_spec(heads=6, kv_heads=2), 4, "name as many as one of 1, 2, 6 with"),
    (a_spec(Dense(3)), 4, "feed-forward 3 wide cannot be shared by 4"),
])  # fmt: skip
def test_what_cannot_be_shared_is_refused_with_the_cure(spec, ranks, says):
    with pytest.raises(UnsupportedModel, match=says):
        ShardedSource(RandomSource(spec), spec, 0, ranks)


def test_a_tensor_of_another_shape_is_refused_before_it_is_cut():
    spec = a_spec()
    source = RandomSource(spec)
    source.shapes = source.shapes | {"layers.0.down": (4, 64)}
    with pytest.raises(BadModelFile, match=r"layers\.0\.down: its shape is"):
        ShardedSource(source, spec, 0, 2).tensor("layers.0.down")


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_ranks_of_every_family_add_up_to_the_whole(family, ranks):
    spec, source = from_folder(family, config_of(family))
    x = np.random.default_rng(0).standard_normal((5, spec.hidden_size)).astype(np.float32)
    whole = weights_of(source)
    ranked = [(shard.spec, weights_of(shard)) for shard in shards(spec, source, ranks)]
    for number, layer in enumerate(spec.layers):
        for branch in (attention_branch, feed_branch):
            wanted = branch(layer, whole, f"layers.{number}.", x)
            total = sum(branch(part.layers[number], w, f"layers.{number}.", x) for part, w in ranked)
            np.testing.assert_allclose(total, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
    for part, w in ranked:
        assert {name: array.shape for name, array in w.items()} == part.shapes()
