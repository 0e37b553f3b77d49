"""Models without files for the ranks of test_parallel.py, which find these functions by name, in processes of their own.

What a function is given is the name of a small model; which rank it is called in, MLX's own environment says.
"""

import os
import signal
import threading
from dataclasses import dataclass, replace

from engine.errors import OutOfDeviceMemory
from engine.model.spec import ModelSpec
from engine.weights.tensors import TensorSource
from tests.support.random_models import small_model


@dataclass
class Model:
    spec: ModelSpec
    tensors: TensorSource

    def close(self) -> None:
        """Nothing is open."""


def open_small(name):
    return Model(*small_model(name))


def in_the_last() -> bool:
    return os.environ["MLX_RANK"] == "1"


def open_where_the_last_has_too_little_memory(name):
    if in_the_last():
        raise OutOfDeviceMemory("the weights take 9 GB, 5 are free: take a smaller model")
    return open_small(name)


def open_where_the_last_has_another_model(name):
    model = open_small(name)
    return Model(replace(model.spec, norm_epsilon=1e-3), model.tensors) if in_the_last() else model


def open_where_the_last_dies(name):
    if in_the_last():
        os.write(2, b"Fatal: a cosmic ray\n")
        os._exit(9)
    return open_small(name)


def open_where_the_last_hangs_at_glm4(name):
    """And ignores that it should end."""
    if in_the_last() and name == "glm4":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        threading.Event().wait()
    return open_small(name)
