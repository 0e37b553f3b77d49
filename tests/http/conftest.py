"""One real server with the demo model for the whole session, and clients for it; servers in threads where a test asks."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from tests.http.support import PATIENCE_S, ProcessServer, ThreadServer, serving
from tests.support.tiny_gguf import write_tiny_gguf


@pytest.fixture(scope="session")
def roomy_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a context length of 65,536."""
    return write_tiny_gguf(tmp_path_factory.mktemp("roomy") / "tiny.gguf", context=65536)


@pytest.fixture(scope="session")
def demo_url(demo_path: Path) -> Iterator[str]:
    """`python -m server` with the demo model, on a free port."""
    arguments = ["--f", str(demo_path), "--port", "0", "--max-model-len", "1024", "--kv-bytes", "100000000"]
    with ProcessServer("-m", "server", *arguments, "--served-model-name", "org/demo") as server:
        yield server.wait_line("Rillet serves").split(" at ")[1].split("/v1 ")[0]
        server.process.terminate()
        assert server.wait_end() == 0, "".join(server.err)


@pytest.fixture(scope="session")
def client(demo_url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=demo_url + "/v1", api_key="any", max_retries=0, timeout=PATIENCE_S) as client:
        yield client


@pytest.fixture(scope="module")
def steered(roomy_path: Path) -> Iterator[ThreadServer]:
    """A server in a thread whose model says "a" for ever."""
    with serving(roomy_path) as server:
        yield server
