"""open_model: what the flags mean, opened, with the advice on sampling that the demo model's file does not carry.

The engine, `rillet show` and the bench open models here. It may block for as long as a download takes.
"""

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from time import time

from engine.config import EngineConfig
from engine.weights.checkpoint import Checkpoint, open_checkpoint
from engine.weights.hub import DEMO_SAMPLING, demo_model, model_path

__all__ = ["open_model"]


def open_model(config: EngineConfig) -> Checkpoint:
    """The checkpoint that the config names. Raises ConfigError, ModelNotFound, BadModelFile, UnsupportedModel."""
    path = model_path(config)
    checkpoint = open_checkpoint(path)
    note_use(path)
    if path != demo_model():
        return checkpoint
    return replace(checkpoint, sampling_defaults={**DEMO_SAMPLING, **checkpoint.sampling_defaults})


def note_use(path: Path) -> None:
    """Set the time of the last access, which `rillet list` shows: file systems note it once a day at most, or never."""
    with suppress(OSError):                              # not ours, or not to be written
        file = next(path.glob("*.safetensors"), path) if path.is_dir() else path
        os.utime(file, (time(), file.stat().st_mtime))
