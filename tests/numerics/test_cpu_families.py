"""Every family and every rope scaling, from safetensors and from GGUF, against transformers (golden/checkpoints.json).

The float32 path of the CPU backend is the engine's oracle: with the same weights it must say what transformers says.
"""

from pathlib import Path

import numpy as np
import pytest

from backends.cpu import mixture
from backends.cpu.runner import CpuBackend
from engine.backend import LoadOptions
from engine.model.spec import ModelSpec
from tests.support.tiny_checkpoints import Parts, config_of, from_folder, from_gguf, golden_cases, tensors_of
from tests.support.to_gguf import write_gguf

CASES = golden_cases()
# llama.cpp's formats have no way to say these: dense layers among experts, a window in some layers, YaRN's exact borders,
# shares of experts that are not normalized in Qwen3
NOT_IN_GGUF = {"qwen3_moe_mixed", "qwen2_sliding", "llama_yarn_untruncated"}


def loaded(spec: ModelSpec, tensors: Parts, case: dict) -> CpuBackend:
    """LongRoPE's divisors are those for a context as long as the case."""
    backend = CpuBackend()
    backend.load(spec.at_context(len(case["tokens"])), tensors, LoadOptions(dtype="f32"), lambda what, done, of: None)
    backend.allocate_cache(1 << 20)
    return backend


def logprobs(backend: CpuBackend, case: dict, make_step) -> np.ndarray:
    """At the case's positions, (P, V)."""
    expected = np.array(case["logprobs"])
    counts = np.full(len(expected), expected.shape[1], np.int32)
    out = backend.wait(backend.submit(make_step([(case["tokens"], 0, [2, 1])], case["positions"], top_count=counts)))
    backend.close()
    found = np.empty(expected.shape)
    np.put_along_axis(found, out.top_ids.astype(np.int64), out.top_logprobs, 1)
    return found


@pytest.mark.parametrize("name", CASES)
def test_safetensors_say_what_transformers_says(name: str, make_step) -> None:
    case = CASES[name]
    spec, tensors = from_folder(case["checkpoint"], case["changes"])
    found = logprobs(loaded(spec, tensors, case), case, make_step)
    np.testing.assert_allclose(found, case["logprobs"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in CASES if name not in NOT_IN_GGUF])
def test_a_gguf_of_it_says_the_same(name: str, make_step, tmp_path: Path) -> None:
    case = CASES[name]
    config = config_of(case["checkpoint"], case["changes"])
    spec, tensors = from_gguf(write_gguf(tmp_path / "model.gguf", config, tensors_of(case["checkpoint"])))
    found = logprobs(loaded(spec, tensors, case), case, make_step)
    np.testing.assert_allclose(found, case["logprobs"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "experts" in case])
def test_every_token_goes_to_the_experts_of_transformers(name: str, make_step, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    backend = loaded(*from_folder(case["checkpoint"], case["changes"]), case)
    chosen, choose = [], mixture.choose_experts

    def remember(*arguments) -> tuple[np.ndarray, np.ndarray]:
        experts, shares = choose(*arguments)
        chosen.append(experts.tolist())
        return experts, shares

    monkeypatch.setattr(mixture, "choose_experts", remember)
    logprobs(backend, case, make_step)
    assert chosen == case["experts"]


def test_the_cases_differ_from_each_other_where_the_feature_matters() -> None:
    """A scaling that nobody applied would pass if its golden data were plain rope's."""
    plain = np.array(CASES["llama"]["logprobs"])
    for name in ("linear", "yarn", "yarn_mscale", "yarn_untruncated", "yarn_factor", "longrope", "llama3"):
        assert np.abs(np.array(CASES[f"llama_{name}"]["logprobs"]) - plain).max() > 1e-2, name
    assert CASES["llama_dynamic"]["logprobs"] == CASES["llama"]["logprobs"]
    for name, base in (("qwen2_sliding", "qwen2"), ("mistral_full", "mistral"), ("glm4_yarn", "glm4")):
        assert np.abs(np.array(CASES[name]["logprobs"]) - CASES[base]["logprobs"]).max() > 1e-2, name
