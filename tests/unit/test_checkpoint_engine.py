"""A folder of safetensors through the whole engine on the CPU: the same tokens as the same weights from a GGUF file."""

from pathlib import Path

import pytest

from engine import Engine, EngineConfig
from engine.weights.checkpoint import open_checkpoint
from tests.support.tiny_folder import write_tiny_folder
from tests.support.tiny_gguf import write_tiny_gguf

# No digits: the vocabulary of the GGUF file splits them one by one, that of the folder does not.
PROMPTS = ["hello world", "then the world in words", [5, 77, 140, 9], [{"role": "user", "content": "hello"}]]


async def answers(path: Path) -> list[tuple[list[int], str]]:
    config = EngineConfig(backend="cpu", dtype="f32", kv_bytes=4 << 20, max_num_seqs=2)
    async with Engine(config, checkpoint=open_checkpoint(path)) as engine:
        results = [await engine.generate(prompt, temperature=0.0, max_tokens=24) for prompt in PROMPTS]
    return [(result.token_ids, result.text) for result in results]


@pytest.mark.anyio
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("shards", [0, 3])
async def test_a_folder_answers_as_the_same_weights_in_gguf(tmp_path: Path, family: str, shards: int) -> None:
    folder = write_tiny_folder(tmp_path / "tiny", family, shards=shards, generation={"eos_token_id": [2], "temperature": 0.6})
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf", family)
    ours = await answers(folder)
    assert ours == await answers(gguf)
    assert len({tuple(tokens) for tokens, _ in ours}) == len(PROMPTS)


@pytest.mark.anyio
async def test_the_engine_takes_the_folder_and_its_makers_advice(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path / "tiny", dtype="BF16", tied=True, generation={"temperature": 0.6, "top_k": 5})
    config = EngineConfig(weight_path=str(folder), backend="cpu", kv_bytes=4 << 20, max_num_seqs=2)
    async with Engine(config) as engine:
        assert engine.model_name == "tiny"
        assert engine.sampling_defaults == {"temperature": 0.6, "top_k": 5}
        result = await engine.generate([{"role": "user", "content": "hello"}], max_tokens=5, ignore_eos=True)
    assert len(result.token_ids) == 5
