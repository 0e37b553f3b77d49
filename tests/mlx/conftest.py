"""Where Metal kernels run in these tests: on Metal, or in the shim, see native.py; and what is skipped where neither does.

All tests ask mx.metal.is_available(). Where MLX has Metal but the device does not run kernels (virtual machines), that
answer is made no and MLX computes on the CPU, as it does on Linux. The shim needs Linux: elsewhere its tests are skipped.
"""

import platform
import shutil
import sys

import pytest

try:
    import mlx.core as mx
except ImportError:
    mx = None

from tests.mlx.native import wanted, why_not

STARTS_PROCESSES = ("test_parallel.py",)      # they would find Metal again


def no_shim() -> str | None:
    """Why the shim cannot run here."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return "the shim runs on Linux, x86-64 or aarch64, and there is no Metal"
    return None if shutil.which("g++") else "the shim compiles with g++: apt install g++"


def pytest_configure(config: pytest.Config) -> None:
    try:
        choice = wanted()
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    available = mx is not None and mx.metal.is_available()
    if choice == "native":
        reason = why_not() if available else "MLX has no Metal here"
        if reason is not None:
            raise pytest.UsageError(f"RILLET_METAL=native: {reason}")
    elif available and (choice == "shim" or why_not() is not None):
        mx.set_default_device(mx.cpu)
        mx.metal.is_available = lambda: False
        config.stash[WITHOUT_ITS_METAL] = True
    if mx is not None and not mx.metal.is_available() and (lacking := no_shim()) is not None:
        leave_the_shim_out(lacking)


WITHOUT_ITS_METAL = pytest.StashKey[bool]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.stash.get(WITHOUT_ITS_METAL, False):
        return
    for item in items:
        if item.path.parent.name == "mlx" and item.path.name in STARTS_PROCESSES:
            item.add_marker(pytest.mark.skip(reason="it starts processes, which would find the Metal that is left out"))


def leave_the_shim_out(reason: str) -> None:
    """Who makes a shim that runs kernels is skipped; tracing (run=False) works everywhere."""
    from tests.mlx.shim import ShimMetal

    made = ShimMetal.__init__

    def init(self: ShimMetal, *arguments: object, run: bool = True, **options: object) -> None:
        if run:
            pytest.skip(reason)
        made(self, *arguments, run=run, **options)

    ShimMetal.__init__ = init
