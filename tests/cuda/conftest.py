"""The emulated device needs g++ and a machine whose fibers it can switch; else its tests are skipped, and say why."""

import platform
import shutil
import sys

import pytest

from tests.cuda.devices import ON_A_GPU

WITHOUT = frozenset({"test_nvidia_device.py", "test_device_check.py", "test_compile.py", "test_dense_gemm.py"})


def missing() -> str | None:
    """Why the emulated device cannot run here."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return "the emulated device runs on Linux, x86-64 or aarch64"
    if shutil.which("g++") is None:
        return "the emulated device is compiled by g++: apt install g++"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = None if ON_A_GPU else missing()
    if reason is None:
        return
    for item in items:
        if item.path.parent.name == "cuda" and item.path.name not in WITHOUT:
            item.add_marker(pytest.mark.skip(reason=reason))
