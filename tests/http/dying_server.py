"""A whole server process whose device burns at the first step; run by test_process."""

import socket
import sys
import tempfile
from pathlib import Path

from engine import Engine, EngineConfig
from engine.weights.checkpoint import open_checkpoint
from server.__main__ import run
from server.app import create_app
from server.settings import configure_logging
from tests.http.support import Steered
from tests.support.tiny_gguf import write_tiny_gguf

if __name__ == "__main__":
    configure_logging("error")
    backend = Steered()
    backend.fault = RuntimeError("the device burned")
    with tempfile.TemporaryDirectory() as folder:
        path = write_tiny_gguf(Path(folder) / "tiny.gguf", context=4096)
        config = EngineConfig(served_model_name="dying")
        checkpoint = open_checkpoint(path)
        app = create_app(
            config, make_engine=lambda progress: Engine(config, progress=progress, backend=backend, checkpoint=checkpoint)
        )
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        sys.exit(run(app, listener))
