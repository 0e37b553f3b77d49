"""Rows of one token: paged attention with a split context, against its definition in float64."""

import numpy as np
import pytest

from backends.cuda.attention import SplitWorkspace, attend_decode, attention_kernels, splits_for
from engine.errors import StepFailed, UnsupportedModel
from tests.cuda.attention_reference import Case, assert_close, device_for, is_close, make_attention

FILES = ("attention_decode.cu",)
USUAL = [make_attention(head_size=64), make_attention(head_size=128)]


def make_device(seed=0, **more):
    return device_for(USUAL, ("bf16", "fp8"), FILES, seed=seed, **more)


def decode(device, case, splits=1, times=1):
    """out (T, H hs) as float32, of all rows."""
    qkv, pool, starts, lengths, tables, width, out = case.on(device)
    stream = device.stream()
    rows = len(case.kv_lengths)
    workspace = SplitWorkspace.make(device, stream, case.attention, rows * splits) if splits > 1 else None
    for _ in range(times):
        attend_decode(
            stream, qkv, pool, case.layout, case.layer, rows, starts, lengths, tables, width, splits, workspace, out,
            case.attention,
        )  # fmt: skip
    if workspace is not None:
        assert not device.get(workspace.counters).any()
    return device.get(out)


@pytest.mark.parametrize("item", ["bf16", "fp8"])
@pytest.mark.parametrize("head_size", [64, 128])
def test_contexts_around_the_borders_of_tiles_and_pages(head_size, item):
    attention = make_attention(heads=2, kv_heads=1, head_size=head_size)
    case = Case.make([(1, n) for n in (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 257)], attention, item=item)
    assert_close(decode(make_device(), case), case.expected)


@pytest.mark.parametrize("group", [1, 3, 4, 7, 8, 16, 17, 40])
def test_every_group_of_heads_finds_its_own_keys(group):
    attention = make_attention(heads=2 * group, kv_heads=2, head_size=64)
    case = Case.make([(1, 40), (1, 33)], attention, seed=group)
    assert_close(decode(make_device(), case, splits=2), case.expected)


@pytest.mark.parametrize("item", ["bf16", "fp8"])
def test_a_long_context(item):
    case = Case.make([(1, 5000)], make_attention(heads=4, kv_heads=1, head_size=64), item=item)
    assert_close(decode(make_device(), case, splits=7), case.expected)


@pytest.mark.parametrize("splits", [1, 2, 3, 5, 33, 64])
def test_any_number_of_splits_gives_the_same_attention(splits):
    attention = make_attention(heads=3, kv_heads=1, head_size=64)
    case = Case.make([(1, n) for n in (1, 64, 65, 700, 33)], attention, spare_columns=3)
    assert_close(decode(make_device(), case, splits), case.expected)


def test_the_workspace_can_be_used_again_and_the_result_is_the_same_to_the_bit():
    case = Case.make([(1, 300), (1, 70)], make_attention(heads=4, kv_heads=2, head_size=64))
    once = decode(make_device(), case, splits=4)
    np.testing.assert_array_equal(decode(make_device(seed=5), case, splits=4, times=3), once)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("item", ["bf16", "fp8"])
def test_the_order_of_threads_does_not_matter(seed, item):
    case = Case.make([(1, 200), (1, 95)], make_attention(heads=4, kv_heads=2, head_size=64), item=item)
    np.testing.assert_array_equal(decode(make_device(seed), case, splits=2), decode(make_device(), case, splits=2))


@pytest.mark.parametrize("window", [1, 5, 32, 33, 100])
def test_a_sliding_window(window):
    attention = make_attention(heads=4, kv_heads=2, head_size=64, sliding_window=window)
    case = Case.make([(1, n) for n in (1, 5, 33, 64, 100, 101, 300)], attention)
    assert_close(decode(make_device(), case, splits=3), case.expected)


def test_pages_before_the_window_are_not_read():
    case = Case.make([(1, 200)], make_attention(head_size=64, sliding_window=40))
    case.tables[0, :5] = 2**30              # nothing is there
    assert_close(decode(make_device(), case, splits=2), case.expected)


@pytest.mark.parametrize("cap", [1.0, 30.0])
def test_a_soft_cap_and_a_scale(cap):
    case = Case.make([(1, 50), (1, 200)], make_attention(heads=2, head_size=64, soft_cap=cap, scale=0.3))
    assert_close(decode(make_device(), case, splits=2), case.expected)


def test_layers_and_pages_beyond_four_gigabytes():
    case = Case.make([(1, 100), (1, 33)], make_attention(heads=2, kv_heads=2, head_size=64), layers=3, layer=2, far=True)
    assert int(case.tables.max()) * case.layout.page_bytes > 2**33
    assert_close(decode(make_device(), case, splits=2), case.expected)


def test_padded_rows_read_a_scratch_page_and_disturb_nobody():
    case = Case.make([(1, 70), (1, 1), (1, 1), (1, 1)], make_attention(heads=2, head_size=64))
    case.tables[2:] = case.tables[1]        # all padding on one page
    got = decode(make_device(), case, splits=2)
    assert_close(got[:1], case.expected[:1])
    assert np.isfinite(got).all()


def test_a_captured_launch_serves_other_lengths_tables_and_widths():
    attention = make_attention(heads=4, kv_heads=2, head_size=64)
    device = make_device()
    cases = [Case.make([(1, a), (1, b)], attention, seed=a) for a, b in ((40, 1), (130, 300), (64, 65))]
    longest = max(cases, key=lambda case: case.pool.size)
    arrays = longest.on(device)
    qkv, pool, starts, lengths, tables, width, out = arrays
    stream = device.stream()
    workspace = SplitWorkspace.make(device, stream, attention, 2 * 4)
    rows = 2, starts, lengths, tables, width
    graph = stream.capture(lambda: attend_decode(stream, qkv, pool, longest.layout, 0, *rows, 4, workspace, out, attention))
    for case in cases:
        for target, source in ((qkv, case.qkv), (lengths, case.kv_lengths), (tables, case.tables)):
            stream.copy_in(target.address, source)
        stream.copy_in(pool, case.pool)
        stream.copy_in(width.address, np.array([case.tables.shape[1]], np.int32))
        stream.replay(graph)
        assert_close(device.get(out), case.expected)


def test_only_the_first_rows_of_a_mixed_step_are_done():
    case = Case.make([(1, 40), (1, 50), (3, 60)], make_attention(heads=2, head_size=64))
    device = make_device()
    qkv, pool, starts, lengths, tables, width, out = case.on(device)
    attend_decode(device.stream(), qkv, pool, case.layout, 0, 2, starts, lengths, tables, width, 1, None, out, case.attention)
    got = device.get(out)
    assert_close(got[:2], case.expected[:2])
    assert np.isnan(got[2:]).all()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("copies_wait<STAGES - 2>();", "copies_wait<STAGES - 1>();"),
        ("__syncwarp();  ", "  "),
        ("    __syncthreads();\n    float* shares", "    float* shares"),
        ("    __syncthreads();\n    i64 place", "    i64 place"),
        ("    __syncthreads();\n    u32 before", "    u32 before"),
        ("    __syncthreads();                // weights", "                    // weights"),
        ("page * page_bytes", "page * static_cast<int>(page_bytes)"),
    ],
)  # fmt: skip
def test_a_kernel_without_a_wait_or_barrier_is_found_out(right, wrong):
    case = Case.make([(1, 400), (1, 90)], make_attention(heads=16, kv_heads=1, head_size=64), far=True)
    edits = {"attention_decode.cu": lambda text: text.replace(right, wrong)}

    def is_right(seed):
        try:
            return is_close(decode(device_for(USUAL[:1], files=FILES, seed=seed, edits=edits), case, splits=3), case.expected)
        except StepFailed:
            return False

    assert not all(is_right(seed) for seed in (0, 1, 2, 3))


@pytest.mark.parametrize("head_size", [8, 40, 72, 272, 320])
def test_a_head_size_without_a_kernel_is_refused_with_those_that_there_are(head_size):
    with pytest.raises(UnsupportedModel, match=f"head size {head_size}: .*multiples of 16 from 16 to 256"):
        attention_kernels(make_attention(head_size=head_size), "bf16")


@pytest.mark.full
@pytest.mark.parametrize("item", ["bf16", "fp8"])
@pytest.mark.parametrize("head_size", [16, 48, 80, 96, 112, 160, 192, 256])
def test_other_head_sizes(head_size, item):
    attention = make_attention(heads=6, kv_heads=2, head_size=head_size)
    case = Case.make([(1, n) for n in (1, 17, 33, 300)], attention, item=item)
    for splits, seed in ((1, 0), (3, 1), (3, 2)):
        assert_close(decode(device_for([attention], [item], FILES, seed=seed), case, splits), case.expected)


# ---- how many splits -----------------------------------------------------------------------------------------------------


def test_splits_fill_a_device_that_few_rows_would_leave_idle():
    attention = make_attention(heads=32, kv_heads=8, head_size=128)
    assert splits_for(1, attention, 132, 256) * 8 >= 0.9 * 132 * 3
    assert splits_for(512, attention, 132, 256) == 1


def test_splits_are_few_where_the_context_is_short():
    attention = make_attention(heads=32, kv_heads=8, head_size=128)
    assert [splits_for(1, attention, 132, pages) for pages in (1, 2, 3, 4, 8)] == [1, 1, 1, 2, 4]


def test_splits_never_pass_what_the_kernel_can_add_up():
    attention = make_attention(heads=8, kv_heads=1, head_size=128)
    counts = [splits_for(rows, attention, 132, 10_000) for rows in range(1, 600)]
    assert 50 < max(counts) <= 64
    assert min(counts) == 1


@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 8), (71, 1), (64, 64)])
def test_a_workspace_has_room_for_all_splits_of_any_number_of_rows(heads, kv_heads):
    attention = make_attention(heads=heads, kv_heads=kv_heads, head_size=64)
    device = make_device(multiprocessors=132)
    room = SplitWorkspace.make(device, device.stream(), attention).partials.shape[0]
    counts = {rows: splits_for(rows, attention, 132, 1280) for rows in range(1, 1025)}
    assert all(rows * splits <= room for rows, splits in counts.items() if splits > 1)
