"""Rows of several tokens: paged attention in blocks of queries, against its definition in float64."""

import numpy as np
import pytest

from backends.cuda.attention import attend_decode, attend_prefill, prefill_kernel, queries_per_block, query_blocks
from engine.errors import StepFailed, UnsupportedModel
from tests.cuda.attention_reference import Case, assert_close, device_for, is_close, make_attention

FILES = ("attention_prefill.cu",)
USUAL = [make_attention(head_size=64), make_attention(head_size=128)]


def make_device(seed=0, **more):
    return device_for(USUAL, ("bf16", "fp8"), FILES, seed=seed, **more)


def prefill(device, case, decode_rows=0, queries=None):
    """out (T, H hs) as float32; rows before decode_rows are NaN."""
    qkv, pool, _, _, tables, width, out = case.on(device)
    blocks = query_blocks(case.row_starts, case.kv_lengths, decode_rows, queries or queries_per_block(case.attention))
    blocks = device.put(blocks)
    attend_prefill(device.stream(), qkv, pool, case.layout, case.layer, blocks, tables, width, out, case.attention)
    return device.get(out)


@pytest.mark.parametrize("item", ["bf16", "fp8"])
@pytest.mark.parametrize("head_size", [64, 128])
def test_rows_that_begin_and_end_around_the_borders_of_pages(head_size, item):
    attention = make_attention(heads=4, kv_heads=2, head_size=head_size)
    rows = [(2, 2), (31, 31), (32, 32), (33, 33), (1, 32), (1, 33), (5, 64), (40, 97), (70, 130)]
    case = Case.make(rows, attention, item=item)
    assert_close(prefill(make_device(), case), case.expected)


@pytest.mark.parametrize("group", [1, 3, 4, 7, 8, 130])
def test_every_group_of_heads_finds_its_own_keys(group):
    attention = make_attention(heads=2 * group, kv_heads=2, head_size=64)
    case = Case.make([(9, 40), (45, 45)], attention, seed=group)
    assert_close(prefill(make_device(), case), case.expected)


@pytest.mark.parametrize("item", ["bf16", "fp8"])
def test_a_chunk_at_the_end_of_a_long_context(item):
    case = Case.make([(20, 5000)], make_attention(heads=4, kv_heads=1, head_size=64), item=item)
    assert_close(prefill(make_device(), case), case.expected)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("item", ["bf16", "fp8"])
def test_the_order_of_threads_does_not_matter(seed, item):
    case = Case.make([(40, 100), (33, 33)], make_attention(heads=4, kv_heads=2, head_size=64), item=item)
    np.testing.assert_array_equal(prefill(make_device(seed), case), prefill(make_device(), case))


@pytest.mark.parametrize("window", [1, 5, 32, 33, 100])
def test_a_sliding_window(window):
    attention = make_attention(heads=4, kv_heads=2, head_size=64, sliding_window=window)
    case = Case.make([(80, 80), (70, 200), (3, 101)], attention)
    assert_close(prefill(make_device(), case), case.expected)


def test_pages_before_the_window_are_not_read():
    case = Case.make([(10, 200)], make_attention(head_size=64, sliding_window=30))
    case.tables[0, :5] = 2**30              # nothing is there
    assert_close(prefill(make_device(), case), case.expected)


@pytest.mark.parametrize("cap", [1.0, 30.0])
def test_a_soft_cap_and_a_scale(cap):
    case = Case.make([(50, 90)], make_attention(heads=2, head_size=64, soft_cap=cap, scale=0.3))
    assert_close(prefill(make_device(), case), case.expected)


def test_layers_and_pages_beyond_four_gigabytes():
    case = Case.make([(30, 100), (33, 33)], make_attention(heads=2, kv_heads=2, head_size=64), layers=3, layer=2, far=True)
    assert int(case.tables.max()) * case.layout.page_bytes > 2**33
    assert_close(prefill(make_device(), case), case.expected)


def test_a_mixed_step_is_decode_rows_and_then_blocks_of_queries():
    attention = make_attention(heads=6, kv_heads=2, head_size=64)
    case = Case.make([(1, 33), (1, 100), (40, 70), (1, 5), (2, 2)], attention, spare_columns=2)
    device = device_for([attention], files=("attention_decode.cu", "attention_prefill.cu"))
    qkv, pool, starts, lengths, tables, width, out = case.on(device)
    blocks = device.put(query_blocks(case.row_starts, case.kv_lengths, 2, queries_per_block(attention)))
    stream = device.stream()
    attend_decode(stream, qkv, pool, case.layout, 0, 2, starts, lengths, tables, width, 1, None, out, attention)
    attend_prefill(stream, qkv, pool, case.layout, 0, blocks, tables, width, out, attention)
    assert_close(device.get(out), case.expected)


def test_how_queries_are_cut_does_not_change_a_bit():
    """A tile's row meets the same pages in the same order wherever it stands."""
    case = Case.make([(50, 90)], make_attention(heads=4, kv_heads=2, head_size=64))
    np.testing.assert_array_equal(prefill(make_device(), case, queries=7), prefill(make_device(), case))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("copies_wait<0>();", "copies_wait<1>();"),
        ("        __syncthreads();  ", "          "),
        ("first, end, threadIdx.x);\n        copies", "first, end + 1, threadIdx.x);\n        copies"),
        ("number * page_bytes", "number * static_cast<int>(page_bytes)"),
        ("o[a][k][n][i] *= shrink[i / 2]", "o[a][k][n][i] *= shrink[0]"),
    ],
)  # fmt: skip
def test_a_kernel_without_a_wait_or_barrier_is_found_out(right, wrong):
    case = Case.make([(70, 150)], make_attention(heads=2, kv_heads=1, head_size=64), far=True)
    edits = {"attention_prefill.cu": lambda text: text.replace(right, wrong)}

    def is_right(seed):
        try:
            return is_close(prefill(device_for(USUAL[:1], files=FILES, seed=seed, edits=edits), case), case.expected)
        except StepFailed:
            return False

    assert not all(is_right(seed) for seed in (0, 1, 2, 3))


def test_a_head_size_without_a_kernel_is_refused():
    with pytest.raises(UnsupportedModel, match="head size 72"):
        prefill_kernel(make_attention(head_size=72), "bf16")


@pytest.mark.full
@pytest.mark.parametrize("item", ["bf16", "fp8"])
@pytest.mark.parametrize("head_size", [16, 48, 80, 96, 112, 160, 192, 256])
def test_other_head_sizes(head_size, item):
    attention = make_attention(heads=6, kv_heads=2, head_size=head_size)
    case = Case.make([(20, 20), (40, 97), (1, 33)], attention, item=item)
    for seed in (0, 1, 2):
        assert_close(prefill(device_for([attention], [item], FILES, seed=seed), case), case.expected)


# ---- blocks of queries -----------------------------------------------------------------------------------------------------


def test_blocks_cover_every_query_once_and_know_what_it_sees():
    starts = np.array([0, 1, 2, 9, 12, 28], np.int32)
    lengths = np.array([40, 3, 7, 90, 20], np.int32)
    blocks = query_blocks(starts, lengths, 2, 5)
    assert blocks.dtype == np.int32
    seen = {}
    for first, count, row, keys in blocks.tolist():
        assert 1 <= count <= 5
        for i in range(count):
            assert first + i not in seen
            seen[first + i] = row, keys + i
    expected = {
        token: (row, lengths[row] - (starts[row + 1] - 1 - token))
        for row in (2, 3, 4)
        for token in range(starts[row], starts[row + 1])
    }
    assert seen == expected


def test_blocks_with_most_keys_come_first():
    blocks = query_blocks(np.array([0, 100, 130], np.int32), np.array([100, 400], np.int32), 0, 32)
    assert (np.diff(blocks[:, 3]) <= 0).all()


def test_there_are_no_blocks_where_all_rows_have_one_token():
    assert query_blocks(np.arange(4, dtype=np.int32), np.ones(3, np.int32), 3, 32).shape == (0, 4)


def test_queries_and_heads_share_a_tile():
    assert queries_per_block(make_attention(heads=32, kv_heads=8, head_size=128)) == 32
    assert queries_per_block(make_attention(heads=6, kv_heads=2, head_size=64)) == 42
    assert queries_per_block(make_attention(heads=8, kv_heads=4, head_size=256)) == 32
    assert queries_per_block(make_attention(heads=200, kv_heads=1, head_size=64)) == 1
