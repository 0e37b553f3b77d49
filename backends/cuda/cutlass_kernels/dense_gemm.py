"""C (M, N) = A (M, K) B (N, K)^T in bfloat16 with float32 sums, in CuTe DSL: for sm_90a by WGMMA and TMA, else by mma.sync.

Whoever launches it gives what `launch` names; the grid has one dimension, ceil(M / tile M) * ceil(N / tile N) blocks. K and N
are multiples of what `launch` says, M is any; addresses are multiples of 16. Nothing launches it until seen right on a GPU.
TMA needs tensor maps here: WGMMA reads swizzled tiles, which no plain bulk copy makes of rows.
"""

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
from cutlass import BFloat16, Boolean, Float32, Int32, Int64, cute
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warp, warpgroup
from cutlass.cute.runtime import make_ptr
from cutlass.memory import SmemAllocator
from cutlass.tensor_utils import LayoutEnum
from cutlass.utils import hopper_helpers

from backends.cuda.cutlass_kernels.offline import Compiled, compile_offline

__all__ = ["TARGETS", "DenseGemmSm80", "DenseGemmSm90", "compile"]

TILES_TOGETHER = 8                   # rows of tiles that neighbouring blocks share, so that L2 serves most of B
VECTOR = 8                           # bfloat16 in 16 bytes


def tile_of_block(block: Int32, tiles_m: Int32, tiles_n: Int32) -> Any:
    """(m, n) of a block's tile: down a few rows first, then along N."""
    first = (block // (TILES_TOGETHER * tiles_n)) * TILES_TOGETHER
    rows = cutlass.min(tiles_m - first, Int32(TILES_TOGETHER))
    inner = block - first * tiles_n
    return first + inner % rows, inner // rows


class DenseGemmSm90:
    """One warp copies tiles by TMA, two warpgroups multiply: 128 x 256 of C a block, stages handed over by mbarriers."""

    def __init__(self, stages: int = 4) -> None:
        self.tile = (128, 256, 64)
        self.stages = stages
        self.consumer_warps = 8
        self.threads = (self.consumer_warps + 1) * 32
        self.stage_bytes = (self.tile[0] + self.tile[1]) * self.tile[2] * 2

    @cute.jit
    def __call__(
        self, a: cute.Pointer, b: cute.Pointer, c: cute.Pointer, m: Int32, n: Int32, k: Int32, stream: cuda.CUstream
    ) -> None:
        tile_m, tile_n, tile_k = self.tile
        a_layout = hopper_helpers.make_smem_layout_a(LayoutEnum.ROW_MAJOR, self.tile, BFloat16, self.stages)
        b_layout = hopper_helpers.make_smem_layout_b(LayoutEnum.ROW_MAJOR, self.tile, BFloat16, self.stages)
        k = cute.assume(k, divby=VECTOR)
        mA = cute.make_tensor(a, cute.make_layout((m, k), stride=(k, 1)))
        mB = cute.make_tensor(b, cute.make_layout((n, k), stride=(k, 1)))
        load = cpasync.CopyBulkTensorTileG2SOp()
        a_copy, tmaA = cpasync.make_tiled_tma_atom(load, mA, cute.slice_(a_layout, (None, None, 0)), (tile_m, tile_k))
        b_copy, tmaB = cpasync.make_tiled_tma_atom(load, mB, cute.slice_(b_layout, (None, None, 0)), (tile_n, tile_k))
        blocks = cute.ceil_div(m, tile_m) * cute.ceil_div(n, tile_n)
        self.kernel(a_copy, tmaA, b_copy, tmaB, c, m, n, k, a_layout, b_layout).launch(
            grid=[blocks, 1, 1], block=[self.threads, 1, 1], stream=stream, min_blocks_per_mp=1
        )

    @cute.kernel
    def kernel(
        self, a_copy: cute.CopyAtom, mA: cute.Tensor, b_copy: cute.CopyAtom, mB: cute.Tensor, c: cute.Pointer,
        m: Int32, n: Int32, k: Int32, a_layout: cute.ComposedLayout, b_layout: cute.ComposedLayout,
    ) -> None:  # fmt: skip
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        warp_index = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        tile_m, tile_n, tile_k = self.tile
        at_m, at_n = tile_of_block(block, cute.ceil_div(m, tile_m), cute.ceil_div(n, tile_n))
        steps = cute.ceil_div(k, tile_k)

        shared = SmemAllocator()
        full = shared.allocate_array(Int64, self.stages, byte_alignment=8)       # a stage has arrived
        empty = shared.allocate_array(Int64, self.stages, byte_alignment=8)      # all consumers are done with it
        sA = shared.allocate_tensor(BFloat16, a_layout.outer, 1024, swizzle=a_layout.inner)      # (128, 64, stages)
        sB = shared.allocate_tensor(BFloat16, b_layout.outer, 1024, swizzle=b_layout.inner)      # (256, 64, stages)

        if warp_index == 0:
            with cute.arch.elect_one():
                for stage in cutlass.range_constexpr(self.stages):
                    cute.arch.mbarrier_init(full + stage, 1)
                    cute.arch.mbarrier_init(empty + stage, self.consumer_warps)
            cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()

        if warp_index == self.consumer_warps:
            self.load(a_copy, mA, b_copy, mB, sA, sB, full, empty, at_m, at_n, steps)
        else:
            mma = hopper_helpers.make_trivial_tiled_mma(
                BFloat16, BFloat16, OperandMajorMode.K, OperandMajorMode.K, Float32,
                atom_layout_mnk=(2, 1, 1), tiler_mn=(64, tile_n),
            )  # fmt: skip
            slice_ = mma.get_slice(thread)
            tCrA = mma.make_fragment_A(slice_.partition_A(sA))
            tCrB = mma.make_fragment_B(slice_.partition_B(sB))
            places = cute.local_tile(cute.make_identity_tensor((m, n)), (tile_m, tile_n), (at_m, at_n))
            tCcC = slice_.partition_C(places)
            tCrC = cute.make_rmem_tensor(tCcC.shape, Float32)
            tCrC.fill(0.0)
            self.multiply(mma, tCrC, tCrA, tCrB, full, empty, steps)
            store_pairs(tCrC, tCcC, c, m, n)

    @cute.jit
    def load(
        self, a_copy: cute.CopyAtom, mA: cute.Tensor, b_copy: cute.CopyAtom, mB: cute.Tensor, sA: cute.Tensor,
        sB: cute.Tensor, full: cute.Pointer, empty: cute.Pointer, at_m: Int32, at_n: Int32, steps: Int32,
    ) -> None:  # fmt: skip
        """The copying warp: fill each stage as soon as it is empty. What lies beyond M, N or K arrives as zeros."""
        tile_m, tile_n, tile_k = self.tile
        cpasync.prefetch_descriptor(a_copy)
        cpasync.prefetch_descriptor(b_copy)
        gA = cute.local_tile(mA, (tile_m, tile_k), (at_m, None))                 # (128, 64, steps)
        gB = cute.local_tile(mB, (tile_n, tile_k), (at_n, None))                 # (256, 64, steps)
        alone = cute.make_layout(1)
        tAsA, tAgA = cpasync.tma_partition(a_copy, 0, alone, cute.group_modes(sA, 0, 2), cute.group_modes(gA, 0, 2))
        tBsB, tBgB = cpasync.tma_partition(b_copy, 0, alone, cute.group_modes(sB, 0, 2), cute.group_modes(gB, 0, 2))
        for step in cutlass.range(steps, unroll=1):
            stage = step % self.stages
            turn = (step // self.stages) % 2
            cute.arch.mbarrier_wait(empty + stage, turn ^ 1)                     # the first turn finds every stage empty
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(full + stage, self.stage_bytes)
            cute.copy(a_copy, tAgA[(None, step)], tAsA[(None, stage)], tma_bar_ptr=full + stage)
            cute.copy(b_copy, tBgB[(None, step)], tBsB[(None, stage)], tma_bar_ptr=full + stage)

    @cute.jit
    def multiply(
        self, mma: cute.TiledMma, tCrC: cute.Tensor, tCrA: cute.Tensor, tCrB: cute.Tensor, full: cute.Pointer,
        empty: cute.Pointer, steps: Int32,
    ) -> None:  # fmt: skip
        """The consuming warps: one product is always under way while the next is issued."""
        mma.set(warpgroup.Field.ACCUMULATE, True)
        for step in cutlass.range(steps, unroll=1):
            stage = step % self.stages
            cute.arch.mbarrier_wait(full + stage, (step // self.stages) % 2)
            warpgroup.fence()
            for part in cutlass.range_constexpr(cute.size(tCrA, mode=[2])):
                cute.gemm(mma, tCrC, tCrA[(None, None, part, stage)], tCrB[(None, None, part, stage)], tCrC)
            warpgroup.commit_group()
            warpgroup.wait_group(1)                                              # the step before is done: its stage is free
            if step > 0:
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive(empty + (step - 1) % self.stages)
        warpgroup.wait_group(0)

    @property
    def launch(self) -> dict[str, Any]:
        """Launch facts. Parameters: tensor map of A, M, K, tensor map of B, N, K, C, M, N, K."""
        maps = {"A": [self.tile[0], self.tile[2]], "B": [self.tile[1], self.tile[2]]}
        return {"threads": self.threads, "tile": list(self.tile), "boxes": maps, "k_multiple": VECTOR, "n_multiple": 2}


@cute.jit
def store_pairs(tCrC: cute.Tensor, tCcC: cute.Tensor, c: cute.Pointer, m: Int32, n: Int32) -> None:
    """Registers to C, two neighbouring columns at a time; N is even, so that no pair straddles its end."""
    mC = cute.make_tensor(c, cute.make_layout((m, n), stride=(cute.assume(cutlass.Int64(n), divby=2), 1)))
    pairs = cute.make_rmem_tensor((2,), BFloat16)
    for part in cutlass.range_constexpr(cute.size(tCrC) // 16):
        for i in cutlass.range_constexpr(16 * part, 16 * part + 16, 2):
            row, column = tCcC[i]
            if row < m and column < n:
                pairs[0] = tCrC[i].to(BFloat16)
                pairs[1] = tCrC[i + 1].to(BFloat16)
                cute.autovec_copy(pairs, cute.local_tile(mC[(row, None)], (2,), (column // 2,)))


class DenseGemmSm80:
    """Eight warps of mma.sync: 128 x 128 of C for each block, stages filled by cp.async and read by ldmatrix."""

    def __init__(self, stages: int = 4) -> None:
        self.tile = (128, 128, 32)
        self.stages = stages
        self.warps = (2, 4, 1)
        self.threads = 256

    @cute.jit
    def __call__(
        self, a: cute.Pointer, b: cute.Pointer, c: cute.Pointer, m: Int32, n: Int32, k: Int32, stream: cuda.CUstream
    ) -> None:
        tile_m, tile_n, _ = self.tile
        blocks = cute.ceil_div(m, tile_m) * cute.ceil_div(n, tile_n)
        self.kernel(a, b, c, m, n, k).launch(grid=[blocks, 1, 1], block=[self.threads, 1, 1], stream=stream)

    @cute.kernel
    def kernel(self, a: cute.Pointer, b: cute.Pointer, c: cute.Pointer, m: Int32, n: Int32, k: Int32) -> None:
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        tile_m, tile_n, tile_k = self.tile
        at_m, at_n = tile_of_block(block, cute.ceil_div(m, tile_m), cute.ceil_div(n, tile_n))
        steps = k // tile_k

        stride = cute.assume(cutlass.Int64(k), divby=VECTOR)
        mA = cute.make_tensor(a, cute.make_layout((m, k), stride=(stride, 1)))
        mB = cute.make_tensor(b, cute.make_layout((n, k), stride=(stride, 1)))
        gA = cute.local_tile(mA, (tile_m, tile_k), (at_m, None))                 # (128, 32, steps)
        gB = cute.local_tile(mB, (tile_n, tile_k), (at_n, None))
        cA = cute.local_tile(cute.make_identity_tensor((m, k)), (tile_m, tile_k), (at_m, 0))
        cB = cute.local_tile(cute.make_identity_tensor((n, k)), (tile_n, tile_k), (at_n, 0))

        # 8 rows of 64 bytes, chunks of 16 bytes exchanged by the row, so that ldmatrix reads 8 rows without bank conflicts
        atom = cute.make_composed_layout(cute.make_swizzle(2, 3, 3), 0, cute.make_layout((8, tile_k), stride=(tile_k, 1)))
        a_layout = cute.tile_to_shape(atom, (tile_m, tile_k, self.stages), (0, 1, 2))
        b_layout = cute.tile_to_shape(atom, (tile_n, tile_k, self.stages), (0, 1, 2))
        shared = SmemAllocator()
        sA = shared.allocate_tensor(BFloat16, a_layout, 128)
        sB = shared.allocate_tensor(BFloat16, b_layout, 128)

        across = tile_k // VECTOR
        fetch = cute.make_tiled_copy_tv(
            cute.make_copy_atom(cpasync.CopyG2SOp(cache_mode=cpasync.LoadCacheMode.GLOBAL), BFloat16, num_bits_per_copy=128),
            cute.make_layout((self.threads // across, across), stride=(across, 1)),
            cute.make_layout((1, VECTOR)),
        )
        own = fetch.get_slice(thread)
        tAgA, tAsA, tAcA = own.partition_S(gA), own.partition_D(sA), own.partition_S(cA)   # (16 bytes, rows, 1, steps)
        tBgB, tBsB, tBcB = own.partition_S(gB), own.partition_D(sB), own.partition_S(cB)
        there_a, there_b = rows_there(tAcA, m), rows_there(tBcB, n)

        mma = cute.make_tiled_mma(
            warp.MmaF16BF16Op(BFloat16, Float32, (16, 8, 16)), cute.make_layout(self.warps),
            permutation_mnk=(self.warps[0] * 16, self.warps[1] * 16, 16),
        )  # fmt: skip
        slice_ = mma.get_slice(thread)
        tCrA = mma.make_fragment_A(slice_.partition_A(sA[None, None, 0]))
        tCrB = mma.make_fragment_B(slice_.partition_B(sB[None, None, 0]))
        tCcC = slice_.partition_C(cute.local_tile(cute.make_identity_tensor((m, n)), (tile_m, tile_n), (at_m, at_n)))
        tCrC = cute.make_rmem_tensor(tCcC.shape, Float32)
        tCrC.fill(0.0)
        read = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, 4), BFloat16)
        read_a, read_b = cute.make_tiled_copy_A(read, mma), cute.make_tiled_copy_B(read, mma)
        tRsA, tRrA = read_a.get_slice(thread).partition_S(sA), read_a.get_slice(thread).retile(tCrA)
        tRsB, tRrB = read_b.get_slice(thread).partition_S(sB), read_b.get_slice(thread).retile(tCrB)

        for step in cutlass.range_constexpr(self.stages - 1):
            if step < steps:
                cute.copy(fetch, tAgA[None, None, None, step], tAsA[None, None, None, step], pred=there_a)
                cute.copy(fetch, tBgB[None, None, None, step], tBsB[None, None, None, step], pred=there_b)
            cute.arch.cp_async_commit_group()

        for step in cutlass.range(steps, unroll=1):
            cute.arch.cp_async_wait_group(self.stages - 2)
            cute.arch.sync_threads()                 # this stage is there for all, and all are done with the one before it
            ahead = step + self.stages - 1
            if ahead < steps:
                to = ahead % self.stages
                cute.copy(fetch, tAgA[None, None, None, ahead], tAsA[None, None, None, to], pred=there_a)
                cute.copy(fetch, tBgB[None, None, None, ahead], tBsB[None, None, None, to], pred=there_b)
            cute.arch.cp_async_commit_group()        # an empty group keeps the count
            stage = step % self.stages
            for part in cutlass.range_constexpr(cute.size(tCrA, mode=[2])):
                cute.copy(read_a, tRsA[None, None, part, stage], tRrA[None, None, part])
                cute.copy(read_b, tRsB[None, None, part, stage], tRrB[None, None, part])
                cute.gemm(mma, tCrC, tCrA[None, None, part], tCrB[None, None, part], tCrC)
        store_pairs(tCrC, tCcC, c, m, n)

    @property
    def launch(self) -> dict[str, Any]:
        """Launch facts. Parameters: A, B, C, M, N, K."""
        return {"threads": self.threads, "tile": list(self.tile), "boxes": {}, "k_multiple": self.tile[2], "n_multiple": 2}


@cute.jit
def rows_there(coordinates: cute.Tensor, rows: Int32) -> cute.Tensor:
    """Which of a thread's 16-byte copies are of rows that exist. What is not copied reaches only what is not stored."""
    count = cute.size(coordinates, mode=[1])
    across = cute.size(coordinates, mode=[2])
    there = cute.make_rmem_tensor(cute.make_layout((1, count, across), stride=(count, 1, 0)), Boolean)
    for i in cutlass.range_constexpr(count):
        there[0, i, 0] = cute.elem_less(coordinates[(0, 0), i, 0][0], rows)
    return there


TARGETS: dict[str, type] = {"sm_80": DenseGemmSm80, "sm_89": DenseGemmSm80, "sm_90a": DenseGemmSm90, "sm_120": DenseGemmSm80}


def compile(target: str) -> Compiled:
    """For one of TARGETS; needs no GPU."""
    gemm = TARGETS[target]()
    pointer = make_ptr(BFloat16, 16, cute.AddressSpace.gmem, assumed_align=16)           # nothing is read
    return compile_offline(gemm, (pointer, pointer, pointer, Int32(1), Int32(1), Int32(1)), target)
