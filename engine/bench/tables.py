"""Published tables whose rows bench can run again: the figures of vllm.rs's README (commit 841ba0d), on synthetic models."""

from dataclasses import dataclass

__all__ = ["TABLES", "Published"]


@dataclass(frozen=True, slots=True)
class Published:
    """A row: the synthetic model of the same shape and types, the workload, and what was published for which device."""

    synthetic: str
    workload: str
    rate: float
    device: str

    @property
    def goal(self) -> str:
        return f"vllm.rs, {self.device}: {self.rate:,.0f}"


TABLES: dict[str, tuple[Published, ...]] = {
    "seed": (
        Published("llama-3.1-8b:q4_k_m", "B1", 90.19, "A100"),
        Published("llama-3.1-8b:q2_k", "B1", 94.47, "A100"),
        Published("qwen3-8b:q4_k_m", "B1", 95.0, "A100"),
        Published("glm-4-9b:q4_k_m", "B1", 70.38, "A100"),
        Published("qwq-32b:q4_k_m", "B1", 35.69, "A100"),
        Published("qwen3-30b-a3b:q4_k_m", "B1", 75.91, "A100"),
        Published("qwen3-0.6b:bf16", "VR256", 10977.55, "A100"),
        Published("qwen3-0.6b:bf16", "B1", 49.42, "Apple M4"),
        Published("qwen3-4b:q4_k_m", "B1", 31.98, "Apple M4"),
        Published("qwen3-8b:q2_k", "B1", 16.07, "Apple M4"),
    ),
}
