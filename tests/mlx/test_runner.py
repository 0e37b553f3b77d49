"""MlxBackend's borders: what it is without MLX, without Metal, without a kernel, before load and after close."""

import logging
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed: pip install rillet[mlx]")

from backends.mlx import metal
from backends.mlx.cache import PortableCache
from backends.mlx.metal_cache import MetalCache
from backends.mlx.runner import MlxBackend
from engine.backend import LoadOptions, create_backend
from engine.errors import BackendError, ConfigError, StepFailed, UnsupportedModel
from tests.mlx.backends import NATIVE, loaded, logits_of_cpu, logits_of_mlx, metal_kernel, mlx_backend, quiet
from tests.mlx.shim import ShimMetal
from tests.support.random_models import RandomSource, small_model
from tests.support.steps import build_step, ints


def test_without_mlx_the_error_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['mlx'] = sys.modules['mlx.core'] = None\n"
        "from engine.backend import create_backend\n"
        "from engine.errors import DeviceUnavailable\n"
        "try: create_backend('mlx')\n"
        "except DeviceUnavailable as error: print(error)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "needs MLX" in found.stdout
    assert "pip install mlx" in found.stdout.replace('"mlx[cpu]"', "mlx")


def test_importing_and_creating_a_backend_runs_nothing_on_a_device() -> None:
    """Streams belong to the thread that uses them first: importing must leave them to the device thread."""
    code = (
        "import threading, backends.mlx.runner as r, backends.mlx.session\n"
        "import mlx.core as mx\n"
        "b = r.MlxBackend()\n"
        "assert mx.get_peak_memory() == 0, mx.get_peak_memory()\n"
    )
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)


@pytest.mark.skipif(NATIVE, reason="Metal is there")
def test_auto_passes_by_an_mlx_without_metal() -> None:
    backend = create_backend("mlx")
    assert (backend.info.name, backend.info.native) == ("mlx", False)
    backend.close()
    chosen = create_backend("auto")
    assert chosen.info.name != "mlx"
    chosen.close()


def test_a_head_size_without_a_kernel_is_said_once_and_computed(caplog) -> None:
    spec, tensors = small_model("llama")
    layer = spec.layers[0]
    odd = replace(layer.attention, heads=4, kv_heads=2, head_size=20, rope=replace(layer.attention.rope, rotary_size=20))
    spec = replace(spec, layers=(replace(layer, attention=odd),) * 2)
    tensors = RandomSource(spec, tensors.types)
    with caplog.at_level(logging.WARNING), loaded(spec, tensors, make_kernel=metal_kernel()) as (cpu, mlx):
        assert isinstance(mlx.session.cache, PortableCache)
        for before in (0, 3):
            step = build_step([([5, 6, 7], before, [1])])
            np.testing.assert_allclose(logits_of_mlx(mlx, step)[0], logits_of_cpu(cpu, step), atol=1e-4)
    assert [record.message for record in caplog.records if "head size" in record.message] == [
        "head size 20 has no Metal kernel: attention is MLX's own, and slower"
    ]


def test_a_device_that_loses_writes_in_place_gets_mlx_s_own_operations(caplog, monkeypatch) -> None:
    """self_check finds it: here the kernels work on copies of the pools, as if MLX had made one."""
    spec, tensors = small_model("k-quants")
    kernel = metal_kernel()
    monkeypatch.setattr(metal.MetalKernels, "write_cache", lambda self, keys, values, pools, slots, *rest: slots[:1])
    with caplog.at_level(logging.WARNING), loaded(spec, tensors, make_kernel=kernel) as (cpu, mlx):
        assert isinstance(mlx.session.cache, PortableCache)
        step = build_step([([5, 6, 7], 0, [1])])
        np.testing.assert_allclose(logits_of_mlx(mlx, step)[0], logits_of_cpu(cpu, step), atol=1e-3)
    assert sum("not read back" in record.message for record in caplog.records) == 1


@pytest.mark.skipif(NATIVE, reason="Metal is there")
def test_without_metal_an_fp8_cache_is_refused() -> None:
    backend = MlxBackend()
    assert "fp8_kvcache" not in backend.info.supports
    with pytest.raises(UnsupportedModel, match="leave --fp8-kvcache out"):
        backend.load(*small_model("qwen3"), LoadOptions(fp8_kvcache=True), quiet)


def test_an_unknown_dtype_is_refused() -> None:
    backend = MlxBackend()
    with pytest.raises(ConfigError, match="dtype 'f64' is not known to the mlx backend"):
        backend.load(*small_model("llama"), LoadOptions(dtype="f64"), quiet)


def test_before_load_and_after_close_it_says_so_and_closing_twice_is_nothing() -> None:
    backend = MlxBackend()
    with pytest.raises(BackendError, match="call load first"):
        backend.allocate_cache(None)
    backend.close()
    backend.close()
    backend = mlx_backend(*small_model("llama"))
    backend.close()
    backend.close()
    with pytest.raises(BackendError, match="is closed"):
        backend.submit(build_step([([1], 0, [0])]))


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("token 320", {"tokens": ints([320, 1, 2])}),
        ("token -1", {"tokens": ints([-1, 1, 2])}),                 # nothing was drawn before
        ("slot 512", {"slots": ints([0, 1, 512])}),
        ("page -1", {"page_tables": ints([[-1]])}),
        ("page to copy 16", {"copies": ints([[0, 16]])}),
        ("index in sample_at 3", {"sample_at": ints([3])}),
    ],
)
def test_indices_outside_of_the_arrays_are_refused_before_the_device_sees_them(what, change) -> None:
    backend = mlx_backend(*small_model("llama"), pages=16)
    with pytest.raises(StepFailed, match=what):
        backend.submit(replace(build_step([([5, 6, 7], 0, [0])]), **change))
    backend.close()


def test_the_kernels_and_the_fp8_cache_are_used_where_they_can_be() -> None:
    spec, tensors = small_model("k-quants")
    backend = mlx_backend(spec, RandomSource(spec, tensors.types), make_kernel=metal_kernel(), fp8_kvcache=True)
    assert isinstance(backend.session.cache, MetalCache)
    assert backend.session.cache.pools[0].keys.itemsize == 1
    backend.close()


@pytest.mark.skipif(NATIVE, reason="counts what the shim compiles")
def test_after_the_warm_up_no_step_needs_another_variant_of_a_kernel() -> None:
    shim = ShimMetal((0,))
    spec, tensors = small_model("k-quants")
    backend = mlx_backend(spec, tensors, make_kernel=shim.metal_kernel, pages=24)
    backend.session.warm_up()
    known = set(shim.generated)
    assert known
    table = list(range(16))
    prompt = [3] * 40
    for rows in (
        [(prompt, 0, table)], [([5], 40, table), ([6] * 7, 0, [20])], [([7], 500, table)],
        *([([8], 100 + number, table)] * number for number in range(1, 9)), [([9], 300, table)] * 13,
    ):  # fmt: skip
        backend.wait(backend.submit(build_step(rows)))
    new = [text.split("\n")[0] for key, text in shim.generated.items() if key not in known]
    assert new == []
    backend.close()
