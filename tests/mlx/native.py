"""Whether Metal kernels run here as they are written, found out by a kernel that has nothing of ours; the tests' one switch.

RILLET_METAL says how tests/mlx run: `native` on Metal, or they do not start; `shim` as on a machine without Metal; unset, by
the probe. Virtual machines have a Metal device that lacks what MLX asks for: some end the process, some return zeros.

    python -m tests.mlx.native       exit code 0: kernels run; 1: they do not, and the reason is printed
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["CHOICES", "PROBE_S", "probe", "try_kernel", "wanted", "why_not"]

CHOICES = ("native", "shim")
PROBE_S = 120
PROJECT = Path(__file__).parents[2]
HEADER = "#include <metal_stdlib>\n#include <metal_simdgroup>\n#include <metal_simdgroup_matrix>\nusing namespace metal;\n"
SOURCE = """
    threadgroup float shared[64];
    const uint lane = thread_index_in_simdgroup, group = simdgroup_index_in_threadgroup;
    const float sum = simd_sum(float(x[thread_position_in_threadgroup.x]));
    if (group == 0) shared[lane] = 0.0f, shared[lane + 32] = 0.0f;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (lane == 0) shared[group] = sum;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    simdgroup_matrix<float, 8, 8> a, c;
    c.thread_elements()[0] = 0.0f;
    c.thread_elements()[1] = 0.0f;
    simdgroup_load(a, shared, 8);
    simdgroup_multiply_accumulate(c, a, a, c);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (group == 0) simdgroup_store(c, shared, 8);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    out[thread_position_in_threadgroup.x] = T(shared[thread_position_in_threadgroup.x]);
"""
"""64 threads: sums of two simdgroups go into an 8 x 8 matrix, which is squared."""


def probe() -> str | None:
    """Why kernels do not run on this machine's Metal; None if they do. It may end the process: why_not() asks for it."""
    import mlx.core as mx

    if not mx.metal.is_available():
        return f"MLX has no Metal here ({sys.platform})"
    if not mx.device_count(mx.gpu):
        return "no Metal device answers"
    return try_kernel(mx.fast.metal_kernel)


def try_kernel(metal_kernel: Callable[..., Any]) -> str | None:
    """What is wrong with the results of the small kernel, if anything."""
    import mlx.core as mx
    import numpy as np

    x = mx.arange(64, dtype=mx.float32)
    kernel = metal_kernel(name="probe", input_names=["x"], output_names=["out"], source=SOURCE, header=HEADER)
    first, second = float(np.arange(32).sum()), float(np.arange(32, 64).sum())
    for dtype in (mx.float32, mx.bfloat16):
        (out,) = kernel(
            inputs=[x.astype(dtype)], template=[("T", dtype)], grid=(64, 1, 1), threadgroup=(64, 1, 1),
            output_shapes=[(64,)], output_dtypes=[dtype],
        )  # fmt: skip
        expected = np.zeros(64, np.float32)
        expected[:2] = first**2, first * second
        got = np.array(out.astype(mx.float32))
        if not np.allclose(got, expected, rtol=1e-2):
            return f"a kernel of {dtype} gives {got[:3]}, not {expected[:3]}: this device does not run kernels as Apple's do"
    return None


def why_not() -> str | None:
    """probe() in a process of its own, which it may end."""
    command = [sys.executable, "-m", "tests.mlx.native"]
    try:
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=PROBE_S)
    except subprocess.TimeoutExpired:
        return f"a small kernel takes more than {PROBE_S} s"
    if done.returncode == 0:
        return None
    said = (done.stdout.strip() or done.stderr.strip()).splitlines()
    return said[-1] if said else f"a small kernel ended the process with {done.returncode}"


def wanted() -> str | None:
    """What RILLET_METAL says. Raises ValueError for what it must not be."""
    value = os.environ.get("RILLET_METAL") or None
    if value not in (None, *CHOICES):
        raise ValueError(f"RILLET_METAL is {value!r}, it must be one of {', '.join(CHOICES)}, or unset")
    return value


if __name__ == "__main__":
    reason = probe()
    print(reason or "Metal kernels run here")
    sys.exit(reason is not None)
