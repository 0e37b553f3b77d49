"""Where the tensors of a file lie: every part has the numbers it should, and what does not fit is refused by name."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.errors import BadModelFile, UnsupportedModel
from engine.model.families import gguf_parts, safetensors_parts, spec_from_config
from engine.model.spec import ModelSpec
from engine.weights.gguf_file import GgufFile
from engine.weights.tensors import STORAGE, Part, RawTensor, to_float32
from tests.support.tiny_checkpoints import CHECKPOINTS, config_of, from_folder, from_gguf, tensors_of
from tests.support.to_gguf import write_gguf

FOLDERS = sorted(path.name for path in CHECKPOINTS.iterdir())
EXPERTS = "model.layers.0.mlp.experts"


def floats(values: np.ndarray, name: str = "x") -> RawTensor:
    values = np.ascontiguousarray(values, np.float32)
    return RawTensor(name, values.shape, STORAGE["F32"], values.reshape(-1).view(np.uint8), "file")


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_tensor_of_the_spec_has_a_part_of_its_shape_and_no_byte_of_the_file_is_left(folder: str) -> None:
    spec, source = from_folder(folder)
    assert {name: source.tensor(name).shape for name in source.names()} == spec.shapes()
    used = sum(source.tensor(name).data.nbytes for name in source.names())
    assert used == sum(tensor.data.nbytes for tensor in source.tensors.values())


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if folder != "qwen3_moe_mixed"])
def test_a_gguf_has_the_same_numbers_under_other_names(folder: str, tmp_path: Path) -> None:
    spec, source = from_folder(folder)
    other_spec, other = from_gguf(write_gguf(tmp_path / "model.gguf", config_of(folder), tensors_of(folder)))
    assert other_spec.shapes() == spec.shapes()
    for name in source.names():
        mine, theirs = to_float32(source.tensor(name)), to_float32(other.tensor(name))
        if other_spec.family == "llama" and name.rpartition(".")[2] in ("query", "key", "query_bias", "key_bias"):
            mine, theirs = np.sort(mine, axis=0), np.sort(theirs, axis=0)          # permuted
        np.testing.assert_array_equal(mine, theirs, err_msg=name)


def test_the_gate_is_the_upper_half_of_glm4s_fused_tensor() -> None:
    _, source = from_folder("glm4")
    both = to_float32(source.tensors["model.layers.1.mlp.gate_up_proj.weight"])
    np.testing.assert_array_equal(to_float32(source.tensor("layers.1.gate")), both[:48])
    np.testing.assert_array_equal(to_float32(source.tensor("layers.1.up")), both[48:])


def test_experts_whose_gate_and_up_the_converter_fused(tmp_path: Path) -> None:
    spec, source = from_gguf(write_gguf(tmp_path / "model.gguf", config_of("qwen3_moe"), tensors_of("qwen3_moe")))
    tensors = dict(source.tensors)
    for layer in range(2):
        gate, up = (to_float32(tensors.pop(f"blk.{layer}.ffn_{kind}_exps.weight")) for kind in ("gate", "up"))
        tensors[f"blk.{layer}.ffn_gate_up_exps.weight"] = floats(np.concatenate([gate, up], axis=1))
    parts = gguf_parts(spec, tensors, "file")
    for name in ("layers.1.experts.5.gate", "layers.1.experts.5.up", "layers.0.experts.0.up", "layers.0.experts.3.down"):
        part = parts[name]
        np.testing.assert_array_equal(to_float32(part.of(tensors[part.name], name)), to_float32(source.tensor(name)))


def test_the_shared_router_is_a_row_whether_the_file_has_one_or_two_dimensions(tmp_path: Path) -> None:
    spec, source = from_gguf(write_gguf(tmp_path / "model.gguf", config_of("qwen2_moe"), tensors_of("qwen2_moe")))
    name = "blk.0.ffn_gate_inp_shexp.weight"
    assert source.tensors[name].shape == (32,)
    assert source.tensor("layers.0.shared_router").shape == (1, 32)
    matrix = dict(source.tensors) | {name: replace(source.tensors[name], shape=(1, 32))}
    assert gguf_parts(spec, matrix, "file")["layers.0.shared_router"] == Part(name, 0, 1)
    with pytest.raises(BadModelFile, match=r"\(32, 1\).*\(32,\) or \(1, 32\)"):
        gguf_parts(spec, matrix | {name: replace(matrix[name], shape=(32, 1))}, "file")


def loaded(folder: str) -> tuple[ModelSpec, dict[str, RawTensor]]:
    return spec_from_config(config_of(folder), "config.json"), tensors_of(folder)


@pytest.mark.parametrize(
    ("folder", "name", "shape"),
    [
        ("llama", "model.layers.1.self_attn.q_proj.weight", r"\(64, 32\)"),
        ("llama", "lm_head.weight", r"\(64, 32\)"),
        ("qwen2", "model.layers.0.self_attn.k_proj.bias", r"\(16,\)"),
        ("glm4", "model.layers.0.mlp.gate_up_proj.weight", r"\(96, 32\)"),
        ("qwen3_moe", f"{EXPERTS}.5.down_proj.weight", r"\(32, 16\)"),
        ("qwen2_moe", "model.layers.1.mlp.shared_expert_gate.weight", r"\(1, 32\)"),
    ],
)
def test_a_missing_tensor_is_named_with_the_shape_it_should_have(folder: str, name: str, shape: str) -> None:
    spec, tensors = loaded(folder)
    del tensors[name]
    with pytest.raises(BadModelFile, match=f"missing.*{shape}") as caught:
        safetensors_parts(spec, tensors, "folder")
    assert (caught.value.tensor, caught.value.file) == (name, "folder")


@pytest.mark.parametrize(
    ("folder", "name", "cut"),
    [
        ("llama", "model.norm.weight", lambda x: x[:31]),
        ("llama", "model.layers.0.mlp.down_proj.weight", lambda x: x.T),
        ("glm4", "model.layers.0.mlp.gate_up_proj.weight", lambda x: x[:48]),
        ("qwen3_moe", f"{EXPERTS}.5.down_proj.weight", lambda x: x.reshape(1, *x.shape)),
    ],
)
def test_a_tensor_of_another_shape_is_refused(folder: str, name: str, cut: Callable) -> None:
    spec, tensors = loaded(folder)
    tensors[name] = floats(cut(to_float32(tensors[name])), name)
    with pytest.raises(BadModelFile, match="its shape is") as caught:
        safetensors_parts(spec, tensors, "folder")
    assert caught.value.tensor == name


@pytest.mark.parametrize("stacked", ["ffn_gate_exps", "ffn_down_exps"])
def test_stacked_experts_of_another_number_are_refused(stacked: str, tmp_path: Path) -> None:
    spec, source = from_gguf(write_gguf(tmp_path / "model.gguf", config_of("qwen3_moe"), tensors_of("qwen3_moe")))
    name = f"blk.1.{stacked}.weight"
    values = to_float32(source.tensors[name])
    for other in (values[:5], values.reshape(3, -1, values.shape[2]), values.reshape(-1, values.shape[2])):
        with pytest.raises(BadModelFile, match=r"its shape is .* it must be \(6, ") as caught:
            gguf_parts(spec, dict(source.tensors) | {name: floats(other, name)}, "file")
        assert caught.value.tensor == name


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.q_norm.weight", "model.layers.2.input_layernorm.weight", "visual.patch_embed.weight",
     "model.layers.0.mlp.gate_proj.weight_scale", "model.layers.0.mlp.experts.0.gate_proj.weight", "lm_head.bias"],
)  # fmt: skip
def test_a_tensor_that_would_be_left_out_is_refused_by_name(name: str) -> None:
    spec, tensors = loaded("llama")
    with pytest.raises(UnsupportedModel, match=name.replace(".", r"\.")):
        safetensors_parts(spec, tensors | {name: floats(np.ones(4))}, "folder")


def test_old_files_carry_ropes_frequencies() -> None:
    spec, tensors = loaded("llama")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = floats(np.ones(8))
    assert set(safetensors_parts(spec, tensors, "folder")) == set(spec.shapes())


def test_a_tied_output_may_be_there_only_if_it_is_the_embedding() -> None:
    spec, tensors = loaded("qwen2")
    embedding = tensors["model.embed_tokens.weight"]
    assert "output" not in safetensors_parts(spec, tensors | {"lm_head.weight": embedding}, "folder")
    other = replace(embedding, data=embedding.data[::-1].copy())
    with pytest.raises(UnsupportedModel, match=r"lm_head\.weight"):
        safetensors_parts(spec, tensors | {"lm_head.weight": other}, "folder")


def test_ropes_tensors_are_read_with_the_spec_and_are_no_part(tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
            "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}  # fmt: skip
    path = write_gguf(tmp_path / "model.gguf", config_of("llama", {"rope_parameters": rope}), tensors_of("llama"))
    spec, source = from_gguf(path)
    assert "rope_factors_long.weight" in GgufFile(path).tensors
    assert set(source.names()) == set(spec.shapes())
