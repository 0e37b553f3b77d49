"""Kernels that this device cannot compile, or computes wrongly, cost speed and not the engine: what runs instead is right.

The shim stands for such a device: it changes one kernel's generated text.
"""

import logging

import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed: pip install rillet[mlx]")

from backends.mlx.cache import PortableCache
from backends.mlx.matrices import Blocks
from backends.mlx.metal_cache import MetalCache
from tests.mlx.backends import NATIVE, loaded
from tests.mlx.shim import ShimMetal
from tests.mlx.test_families import TOLERANCE, run
from tests.support.random_models import small_model

pytestmark = pytest.mark.skipif(NATIVE, reason="a native kernel cannot be edited")


def uncompilable(msl: str) -> str:
    return msl.replace("[[kernel]]", "this_is_no_type [[kernel]]")


def without(text: str, other: str):
    def edit(msl: str) -> str:
        assert text in msl
        return msl.replace(text, other)

    return edit


@pytest.fixture
def broken(caplog):
    """(kernel, edit) -> an engine of "k-quants" whose device has that fault; checks that it is right and says so once."""

    def check(kernel, edit, words):
        shim = ShimMetal((0,), {kernel: edit})
        spec, tensors = small_model("k-quants")
        with caplog.at_level(logging.WARNING), loaded(spec, tensors, make_kernel=shim.metal_kernel) as (cpu, mlx):
            run(cpu, mlx, TOLERANCE)
            session = mlx.session
        told = [record.message for record in caplog.records if "Metal kernel" in record.message]
        assert len(told) == 1
        assert told[0].startswith(words)
        return session

    return check


@pytest.mark.parametrize("kernel", ["attend_prefill", "attend_decode", "rope_write", "copy_pages"])
def test_attention_that_does_not_compile_is_mlx_s_own(broken, kernel) -> None:
    session = broken(kernel, uncompilable, "attention: MLX's own operations, which are slower, as the Metal kernel fails:")
    assert isinstance(session.cache, PortableCache)
    assert session.ops.norms is not None                         # the others go on


def test_attention_with_wrong_numbers_is_mlx_s_own(broken) -> None:
    edit = without("position = before + row / G;", "position = before + row / G + 1;")
    words = "attention: MLX's own operations, which are slower, as the Metal kernel is wrong by"
    session = broken("attend_prefill", edit, words)
    assert isinstance(session.cache, PortableCache)


@pytest.mark.parametrize("kernel", ["add_rms_norm", "gated"])
def test_norms_that_do_not_compile_are_mlx_s_own(broken, kernel) -> None:
    session = broken(kernel, uncompilable, "norms: MLX's own operations")
    assert session.ops.norms is None
    assert isinstance(session.cache, MetalCache)


def test_products_that_do_not_compile_are_mlx_s_own(broken) -> None:
    """Of all types, as the text of each fails."""
    spec, tensors = small_model("k-quants")
    with loaded(spec, tensors, make_kernel=ShimMetal((0,), {"block_matmul": uncompilable}).metal_kernel) as (cpu, mlx):
        run(cpu, mlx, TOLERANCE)
        assert not isinstance(mlx.session.weights.output, Blocks)
        assert isinstance(mlx.session.cache, MetalCache)
