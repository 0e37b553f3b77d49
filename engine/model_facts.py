"""ModelFacts: what a model is, in the few words that clients show: its family, size and how its weights rest.

engine.loading looks once, while the files are open; engine.remote has it from its service. For people there is
engine.model_card. No weight is looked at.
"""

from collections import Counter
from dataclasses import dataclass

from engine.weights.checkpoint import Checkpoint

__all__ = ["ModelFacts", "model_facts"]


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """family: the architecture's name, such as qwen3. weights: how many numbers the model has. storage: the type in which
    most of them rest, in GGML's names (Q4_K, BF16). format: gguf or safetensors."""

    family: str
    weights: int
    storage: str
    format: str


def model_facts(checkpoint: Checkpoint) -> ModelFacts:
    """Of an open checkpoint."""
    counts: Counter[str] = Counter()
    for name in checkpoint.tensors.names():
        tensor = checkpoint.tensors.tensor(name)
        counts[tensor.storage.name] += tensor.rows * tensor.shape[-1]
    [(storage, _)] = counts.most_common(1) or [("", 0)]
    kind = "gguf" if checkpoint.path.suffix.lower() == ".gguf" else "safetensors"
    return ModelFacts(checkpoint.spec.family, counts.total(), storage, kind)
