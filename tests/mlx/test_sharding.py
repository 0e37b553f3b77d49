"""Sharded tensors put together again are the whole, bit for bit, for every storage type, MLX's own among them.

That the ranks' branches add up to the whole, test_parallel.py shows on every family.
"""

import logging
from dataclasses import replace

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="MLX is not installed: pip install mlx[cpu]")

from backends.mlx.sharding import ShardedSource  # noqa: E402
from engine.errors import BadModelFile, UnsupportedModel  # noqa: E402
from engine.model.spec import Attention, Dense, Layer, Mixture, ModelSpec, Rope  # noqa: E402
from engine.weights.mlx_layout import MlxLayout  # noqa: E402
from engine.weights.mlx_quantized import mlx_storage  # noqa: E402
from engine.weights.tensors import STORAGE, RawTensor, StorageType, to_float32  # noqa: E402

MLX = {
    storage.name: storage
    for storage in (
        *(mlx_storage(MlxLayout(bits, group, "affine")) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)),
        mlx_storage(MlxLayout(4, 32, "mxfp4")),
    )
}
KINDS = STORAGE | MLX


class RandomSource:
    """Random bytes in the shapes of a spec; `kinds` of what ends on these names, else F32."""

    def __init__(self, spec: ModelSpec, **kinds: str) -> None:
        self.shapes, self.kinds, self.released = spec.shapes(), kinds, []
        self.made = {}

    def names(self) -> list[str]:
        return list(self.shapes)

    def tensor(self, name: str) -> RawTensor:
        if name not in self.made:
            self.made[name] = random_tensor(name, self.shapes[name], KINDS[self.kinds.get(name.rpartition(".")[2], "F32")])
        return self.made[name]

    def release(self, name: str) -> None:
        self.released.append(name)


def random_tensor(name: str, shape: tuple[int, ...], storage: StorageType) -> RawTensor:
    size = int(np.prod(shape)) // storage.block * storage.bytes
    data = np.random.default_rng(list(name.encode())).integers(0, 256, size, np.uint8)
    beside, layout = (), storage.mlx
    if layout is not None:
        grid, kinds = (*shape[:-1], shape[-1] // storage.block), ("F16", "F16") if layout.mode == "affine" else ("U8",)
        u8 = StorageType("U8", 1, 1, -1)
        beside = tuple(random_tensor(f"{name} {at}", grid, STORAGE.get(kind, u8)) for at, kind in enumerate(kinds))
    return RawTensor(name, shape, storage, data, "random", beside)


def a_spec(feed=None, *, heads=4, kv_heads=2, head_size=8, hidden=8, bias=False, tied=True) -> ModelSpec:
    attention = Attention(heads, kv_heads, head_size, 1.0, Rope(1e4, head_size, False), qkv_bias=bias, output_bias=bias)
    return ModelSpec("test", 16, hidden, (Layer(attention, feed or Dense(64)),), 1e-6, tied, 64)


def shards(spec: ModelSpec, source: RandomSource, ranks: int, **options) -> list[ShardedSource]:
    return [ShardedSource(source, spec, rank, ranks, **options) for rank in range(ranks)]


def values(tensor: RawTensor) -> np.ndarray:
    with np.errstate(all="ignore"):                      # random bytes have scales that are not finite
        return to_float32(tensor)


def rows_of(tensor: RawTensor) -> np.ndarray:
    return tensor.data.reshape(tensor.rows, -1)


def layers_of(tensor: RawTensor) -> list[RawTensor]:
    """The tensor and what is beside it."""
    return [tensor, *tensor.beside]


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_the_files_own_bytes_and_together_the_whole(kind) -> None:
    block = KINDS[kind].block
    width, hidden = 6 * max(block, 32), 2 * block if block > 1 else 8
    spec = a_spec(Dense(width), heads=6, kv_heads=3, hidden=hidden)
    source = RandomSource(spec, down=kind, gate=kind)
    cut = shards(spec, source, 3)
    assert [shard.spec.layers[0].feed_forward.width for shard in cut] == [width // 3] * 3
    for name, axis in (("layers.0.down", 1), ("layers.0.gate", 0)):
        whole, parts = source.tensor(name), [shard.tensor(name) for shard in cut]
        for shard, part in zip(cut, parts, strict=True):
            assert part.storage is whole.storage
            assert part.shape == shard.spec.shapes()[name]
        for number, each in enumerate(layers_of(whole)):
            together = np.concatenate([rows_of(layers_of(part)[number]) for part in parts], axis=axis)
            np.testing.assert_array_equal(together, rows_of(each))
        if kind in MLX:
            np.testing.assert_array_equal(np.concatenate([values(part) for part in parts], axis=axis), values(whole))


def as_bfloat16(floats: np.ndarray) -> np.ndarray:
    return np.array(mx.array(floats).astype(mx.bfloat16).astype(mx.float32))


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "IQ4_XS", "Q2_K", "Q3_K", "MLX_AFFINE3_G128"])
@pytest.mark.parametrize(("floats", "rounded"), [("F32", lambda weights: weights), ("BF16", as_bfloat16)])
def test_fewer_blocks_than_ranks_become_floats_with_one_log_line(kind, floats, rounded, caplog) -> None:
    width = 3 * KINDS[kind].block
    spec = a_spec(Dense(width))
    source = RandomSource(spec, down=kind)
    with caplog.at_level(logging.INFO):
        cut = shards(spec, source, 4, floats=floats)
    parts = [shard.tensor("layers.0.down") for shard in cut]
    assert [(part.storage.name, part.shape) for part in parts] == [(floats, (8, width // 4))] * 4
    together = np.concatenate([to_float32(part) for part in parts], axis=1)
    np.testing.assert_array_equal(together, rounded(values(source.tensor("layers.0.down"))))
    assert len(caplog.records) == 1
    assert f"down ({kind}) rest as {floats}" in caplog.text


def test_heads_that_end_within_a_block_make_the_attention_output_floats() -> None:
    spec = a_spec(heads=4, kv_heads=4, head_size=64, hidden=256)
    source = RandomSource(spec, attention_output="Q4_K")
    parts = [shard.tensor("layers.0.attention_output") for shard in shards(spec, source, 2, floats="F32")]
    together = np.concatenate([to_float32(part) for part in parts], axis=1)
    np.testing.assert_array_equal(together, values(source.tensor("layers.0.attention_output")))


def test_a_width_of_three_blocks_is_cut_into_one_and_two_for_all_that_read_it() -> None:
    spec = a_spec(Mixture(2, 1, 768, False, shared_width=512), hidden=256)
    source = RandomSource(spec, down="Q6_K", gate="Q4_K", shared_down="Q4_K")
    first, second = shards(spec, source, 2)
    assert [shard.spec.layers[0].feed_forward.width for shard in (first, second)] == [256, 512]
    assert [shard.spec.layers[0].feed_forward.shared_width for shard in (first, second)] == [256, 256]
    for shard in (first, second):
        for name, shape in shard.spec.shapes().items():
            assert shard.tensor(name).shape == shape, name
    assert second.tensor("layers.0.experts.1.down").storage.name == "Q6_K"


def test_what_is_stored_in_smaller_blocks_in_one_layer_is_cut_as_in_the_others() -> None:
    spec = a_spec(Dense(768))
    spec = replace(spec, layers=spec.layers * 2)
    source = RandomSource(spec, down="Q4_K")
    source.made["layers.1.down"] = random_tensor("layers.1.down", (8, 768), STORAGE["Q8_0"])
    for shard, width in zip(shards(spec, source, 2), (256, 512), strict=True):
        assert [layer.feed_forward.width for layer in shard.spec.layers] == [width] * 2
        assert shard.tensor("layers.1.down").shape == (8, width)


@pytest.mark.parametrize("ranks", [2, 4])
def test_heads_go_to_ranks_together_with_the_key_heads_that_they_read(ranks) -> None:
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


def test_the_output_bias_is_added_by_the_first_rank_alone() -> None:
    spec = a_spec(bias=True)
    source = RandomSource(spec, attention_output_bias="F16")
    first, second = (shard.tensor("layers.0.attention_output_bias") for shard in shards(spec, source, 2))
    np.testing.assert_array_equal(first.data, source.tensor("layers.0.attention_output_bias").data)
    assert second.shape == first.shape
    assert not to_float32(second).any()


def test_only_who_draws_has_the_output_matrix() -> None:
    spec = a_spec(tied=False)
    first, second = shards(spec, RandomSource(spec), 2)
    assert "output" in first.spec.shapes()
    assert "output" not in second.spec.shapes()


def test_rows_are_views_of_the_file_and_releases_reach_it() -> None:
    spec = a_spec()
    source = RandomSource(spec)
    shard = ShardedSource(source, spec, 1, 2)
    assert np.shares_memory(shard.tensor("layers.0.gate").data, source.tensor("layers.0.gate").data)
    shard.release("layers.0.gate")
    assert source.released == ["layers.0.gate"]


@pytest.mark.parametrize(("spec", "ranks", "says"), [
    (a_spec(heads=9, kv_heads=3), 2, r"9 heads with 3 key/value heads.*2 ranks: name as many as one of 1, 3, 9 with --d"),
    (a_spec(heads=6, kv_heads=2), 4, "name as many as one of 1, 2, 6 with"),
    (a_spec(Dense(3)), 4, "feed-forward 3 wide cannot be shared by 4 ranks: name fewer with --d"),
])  # fmt: skip
def test_what_cannot_be_shared_is_refused_with_the_cure(spec, ranks, says) -> None:
    with pytest.raises(UnsupportedModel, match=says):
        ShardedSource(RandomSource(spec), spec, 0, ranks)


def test_a_tensor_of_another_shape_is_refused_before_it_is_cut() -> None:
    spec = a_spec()
    source = RandomSource(spec)
    source.made["layers.0.down"] = random_tensor("layers.0.down", (4, 64), STORAGE["F32"])
    with pytest.raises(BadModelFile, match=r"layers\.0\.down: its shape is"):
        ShardedSource(source, spec, 0, 2).tensor("layers.0.down")
