"""Folders of safetensors as checkpoints: what is read from which file, and what each damaged folder is told."""

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engine.errors import BadModelFile, ModelError, ModelNotFound, UnsupportedModel
from engine.weights.checkpoint import Checkpoint, open_checkpoint
from engine.weights.tensors import to_float32
from tests.support.tiny_folder import (
    decode_safetensors,
    encode_safetensors,
    join_safetensors,
    tiny_tensors,
    write_json,
    write_shards,
    write_tiny_folder,
)
from tests.support.tiny_gguf import write_tiny_gguf

INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"


def refusal(folder: Path, kind: type[ModelError] = BadModelFile) -> str:
    with pytest.raises(kind) as caught:
        open_checkpoint(folder)
    return str(caught.value)


def weights(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {name: np.array(to_float32(checkpoint.tensors.tensor(name))) for name in checkpoint.tensors.names()}


def edit(path: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    write_json(path, value)


def edit_header(path: Path, change: Callable[[dict], object]) -> None:
    header, data = decode_safetensors(path.read_bytes())
    change(header)
    path.write_bytes(join_safetensors(header, data))


# ---- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_folder_has_the_spec_and_the_weights_of_the_same_model_as_gguf(tmp_path: Path, family: str) -> None:
    folder = open_checkpoint(write_tiny_folder(tmp_path / "tiny", family))
    gguf = open_checkpoint(write_tiny_gguf(tmp_path / "tiny.gguf", family))
    assert folder.name == gguf.name == "tiny"
    assert folder.spec.shapes() == gguf.spec.shapes()
    ours, theirs = weights(folder), weights(gguf)
    assert set(ours) == set(theirs) == set(folder.spec.shapes())
    for name, values in theirs.items():
        if family == "qwen2" or not name.endswith((".query", ".key")):   # rows of those are in another order
            np.testing.assert_array_equal(ours[name], values)
    assert folder.end_ids == gguf.end_ids
    assert folder.tokenizer.encode("hello world") == gguf.tokenizer.encode("hello world")
    folder.close()
    gguf.close()


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_shards_unite_to_the_single_file(tmp_path: Path, dtype: str, shards: int) -> None:
    one = open_checkpoint(write_tiny_folder(tmp_path / "one", dtype=dtype))
    many = open_checkpoint(write_tiny_folder(tmp_path / "many", dtype=dtype, shards=shards))
    assert one.spec == many.spec
    theirs = weights(many)
    for name, values in weights(one).items():
        np.testing.assert_array_equal(theirs[name], values)
        many.tensors.release(name)
        np.testing.assert_array_equal(to_float32(many.tensors.tensor(name)), values)
    one.close()
    many.close()


def test_files_beside_the_model_are_left_alone(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path / "tiny", shards=2)
    for name in ("consolidated.safetensors", "model-00009-of-00009.safetensors", "pytorch_model.bin", "tiny.txt"):
        (folder / name).write_bytes(b"nothing that anybody reads")
    open_checkpoint(folder).close()


def test_one_file_goes_before_an_index(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path / "tiny")
    (folder / INDEX).write_text("no json")
    open_checkpoint(folder).close()


def test_a_snapshot_of_the_hubs_cache_is_links_and_is_called_by_the_models_id(tmp_path: Path) -> None:
    cache = tmp_path / "models--owner--tiny--model"
    snapshot = cache / "snapshots" / ("0" * 40)
    (cache / "blobs").mkdir(parents=True)
    write_tiny_folder(snapshot, shards=2)
    for number, path in enumerate(sorted(snapshot.iterdir())):
        blob = cache / "blobs" / f"{number:064x}"
        path.rename(blob)
        path.symlink_to(Path("..") / ".." / "blobs" / blob.name)
    checkpoint = open_checkpoint(snapshot)
    assert checkpoint.name == "owner/tiny--model"
    checkpoint.close()


def test_a_folder_is_called_by_its_own_name_wherever_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tiny_folder(tmp_path / "tiny")
    (tmp_path / "favourite").symlink_to(folder)
    (folder / "inner").mkdir()
    for here, path, name in (
        (folder, ".", "tiny"), (folder / "inner", "..", "tiny"), (tmp_path, "tiny", "tiny"),
        (tmp_path, "favourite", "favourite"),
    ):  # fmt: skip
        monkeypatch.chdir(here)
        checkpoint = open_checkpoint(Path(path))
        assert checkpoint.name == name
        checkpoint.close()


# ---- what the makers advise -------------------------------------------------------------------------------------------


def test_end_ids_of_both_configurations_are_united(tmp_path: Path) -> None:
    for number, (config, generation, expected) in enumerate([
        (2, None, {2}), (2, {"eos_token_id": 5}, {2, 5}), ([2, 7], {"eos_token_id": [5, 2]}, {2, 5, 7}),
        (None, {"eos_token_id": 9}, {2, 9}), ([], {"eos_token_id": None}, {2}),
    ]):  # fmt: skip
        folder = write_tiny_folder(tmp_path / str(number), config={"eos_token_id": config}, generation=generation)
        checkpoint = open_checkpoint(folder)
        assert expected <= checkpoint.end_ids <= expected | {0, 2}       # 0 and 2 are <|endoftext|> and <|im_end|>
        checkpoint.close()


@pytest.mark.parametrize("value", ["2", -1, 2.0, True, [2, "x"], [[2]], {"a": 2}, 1 << 31, list(range(257))], ids=repr)
def test_end_ids_that_are_none_are_refused(tmp_path: Path, value: object) -> None:
    folder = write_tiny_folder(tmp_path / "tiny", generation={"eos_token_id": value})
    assert "generation_config.json: eos_token_id is" in refusal(folder)


def test_sampling_advice_is_taken_as_the_file_states_it(tmp_path: Path) -> None:
    advice = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0, "repetition_penalty": 1.05}
    others = {"do_sample": False, "max_new_tokens": 2048, "typical_p": None, "transformers_version": "4.37.0"}
    folder = write_tiny_folder(tmp_path / "tiny", generation={**advice, **others})
    assert open_checkpoint(folder).sampling_defaults == advice
    write_json(folder / "generation_config.json", {"do_sample": False, "temperature": None})
    assert open_checkpoint(folder).sampling_defaults == {}
    (folder / "generation_config.json").unlink()
    assert open_checkpoint(folder).sampling_defaults == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -0.1), ("temperature", "0.7"), ("temperature", True), ("temperature", float("nan")), ("top_k", 20.5),
     ("top_k", 20.0), ("top_k", -2), ("top_p", 0), ("top_p", 1.5), ("min_p", [0.1]), ("repetition_penalty", 0),
     ("repetition_penalty", float("inf"))],
)  # fmt: skip
def test_advice_that_no_request_could_ask_for_is_refused(tmp_path: Path, name: str, value: object) -> None:
    folder = write_tiny_folder(tmp_path / "tiny", generation={name: value})
    assert f"generation_config.json: {name}" in refusal(folder)


def test_a_gguf_file_with_a_top_k_that_is_no_integer_is_refused(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", metadata={"general.sampling.top_k": 20.0})
    assert "general.sampling.top_k" in refusal(path)


# ---- tied and not tied ------------------------------------------------------------------------------------------------


def test_a_tied_model_has_no_output(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny_folder(tmp_path / "tiny", tied=True))
    assert checkpoint.spec.tied_output
    assert "output" not in set(checkpoint.tensors.names())
    checkpoint.close()


@pytest.mark.parametrize("kept", [("lm_head.weight", "model.embed_tokens.weight"), ("lm_head.weight",)])
def test_an_output_that_is_the_embedding_counts_once(tmp_path: Path, kept: tuple[str, ...]) -> None:
    folder = write_tiny_folder(tmp_path / "tiny", tied=True)
    tensors = tiny_tensors(tmp_path, "llama", tied=True)
    embedding = tensors.pop("model.embed_tokens.weight")
    tensors |= dict.fromkeys(kept, embedding)
    (folder / "model.safetensors").write_bytes(encode_safetensors(tensors))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.spec.tied_output
    np.testing.assert_array_equal(weights(checkpoint)["embedding"], embedding)
    assert "output" not in set(checkpoint.tensors.names())
    checkpoint.close()


def test_an_output_that_differs_is_not_tied_whatever_the_config_says(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # as transformers 5 does, with a warning
    folder = write_tiny_folder(tmp_path / "tiny", config={"tie_word_embeddings": True})
    checkpoint = open_checkpoint(folder)
    assert not checkpoint.spec.tied_output
    np.testing.assert_array_equal(weights(checkpoint)["output"], tiny_tensors(tmp_path, "llama")["lm_head.weight"])
    assert "they are not tied" in caplog.text
    checkpoint.close()


def test_an_output_that_is_missing_is_not_invented(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path / "tiny", tied=True, config={"tie_word_embeddings": False})
    assert "tensor lm_head.weight" in refusal(folder)


# ---- damaged folders --------------------------------------------------------------------------------------------------


def test_a_missing_shard_is_named_with_its_cure(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path / "tiny", shards=3)
    (folder / SHARD).unlink()
    message = refusal(folder)
    assert str(folder / SHARD) in message
    assert "download it" in message


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "a\\b.safetensors", "..", "", "C:x.safetensors", "x.bin",
     ".safetensors", "x\0.safetensors", "x\n.safetensors", "\ud800.safetensors", 7, None, ["x.safetensors"]],
    ids=repr,
)  # fmt: skip
def test_an_index_may_name_plain_files_of_its_folder_only(tmp_path: Path, name: object) -> None:
    folder = write_tiny_folder(tmp_path / "tiny", shards=3)
    (tmp_path / "x.safetensors").write_bytes((folder / SHARD).read_bytes())
    edit(folder / INDEX, lambda index: index["weight_map"].update({"model.norm.weight": name}))
    message = refusal(folder)
    assert "must be the name of a .safetensors file in the folder" in message
    assert "model.norm.weight" in message


def test_a_tensor_that_the_index_names_and_its_shard_lacks_is_told_with_both(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path / "tiny", shards=3)
    edit(folder / INDEX, lambda index: index["weight_map"].update({"phantom": SHARD}))
    message = refusal(folder)
    assert f"{folder / SHARD}: tensor phantom" in message


def test_a_tensor_in_the_shard_that_the_index_does_not_mean_is_no_substitute(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path / "tiny", shards=3)
    edit(folder / INDEX, lambda index: index["weight_map"].update({"model.norm.weight": "model-00001-of-00003.safetensors"}))
    assert "tensor model.norm.weight" in refusal(folder)


def test_of_two_copies_the_index_chooses_and_without_its_word_neither_counts(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    write_tiny_folder(folder, shards=2)
    tensors = tiny_tensors(tmp_path, "llama")
    shard_of = write_shards(folder, tensors, 2)
    (wrong,) = set(shard_of.values()) - {shard_of["model.norm.weight"]}
    held = {name: values for name, values in tensors.items() if shard_of[name] == wrong}
    held["model.norm.weight"] = tensors["model.norm.weight"] + 1
    (folder / wrong).write_bytes(encode_safetensors(held))
    checkpoint = open_checkpoint(folder)
    np.testing.assert_array_equal(weights(checkpoint)["norm"], tensors["model.norm.weight"])
    checkpoint.close()
    edit(folder / INDEX, lambda index: index["weight_map"].pop("model.norm.weight"))
    assert "does not say which counts" in refusal(folder)


def test_a_tensor_of_a_shard_that_the_index_forgot_is_not_left_out(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path / "tiny", shards=3)
    edit(folder / INDEX, lambda index: index["weight_map"].pop("model.norm.weight"))
    open_checkpoint(folder).close()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": 1}', "{" * 100_000,
     '{"weight_map": {"a": "x.safetensors", "a": "x.safetensors"}}'],
    ids=lambda text: text[:40],
)  # fmt: skip
def test_an_index_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    folder = write_tiny_folder(tmp_path / "tiny", shards=3)
    (folder / INDEX).write_text(text)
    assert INDEX in refusal(folder)


@pytest.mark.parametrize(("found", "kind", "words"), [
    ([], ModelNotFound, "neither model.safetensors nor"),
    (["model-00001-of-00002.safetensors"], ModelNotFound, "no model.safetensors.index.json"),
    (["consolidated.safetensors"], UnsupportedModel, "it has consolidated.safetensors"),
    (["pytorch_model.bin"], UnsupportedModel, "it has pytorch_model.bin"),
    (["adapter_model.safetensors"], UnsupportedModel, "it has adapter_model.safetensors"),
])  # fmt: skip
def test_a_folder_without_a_model_says_what_it_has(tmp_path: Path, found: list, kind: type[ModelError], words: str) -> None:
    folder = write_tiny_folder(tmp_path / "tiny")
    (folder / "model.safetensors").unlink()
    for name in found:
        (folder / name).write_bytes(b"")
    assert words in refusal(folder, kind)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_folder_without_its_other_files_names_them(tmp_path: Path, name: str) -> None:
    folder = write_tiny_folder(tmp_path / "tiny")
    (folder / name).unlink()
    assert name in refusal(folder, ModelNotFound)


@pytest.mark.parametrize("text", ["", "[]", "7", "{", '{"hidden_size": 64, "hidden_size": 65}', "\ufeff{}"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_configuration_that_is_no_object_is_refused(tmp_path: Path, name: str, text: str) -> None:
    folder = write_tiny_folder(tmp_path / "tiny")
    (folder / name).write_text(text)
    assert str(folder / name) in refusal(folder)


def test_a_configuration_of_no_end_is_not_read_to_the_end(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path / "tiny")
    with (folder / "config.json").open("wb") as stream:
        stream.truncate(1 << 33)
    assert "bytes" in refusal(folder)


@pytest.mark.skipif(sys.platform == "win32", reason="has no /dev/zero")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_device_in_place_of_a_file_is_refused(tmp_path: Path, name: str) -> None:
    folder = write_tiny_folder(tmp_path / "tiny")
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    refusal(folder, ModelError)


def test_another_shape_names_file_tensor_and_both_shapes(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path / "tiny")

    def turn(header: dict) -> None:
        header["model.layers.0.mlp.up_proj.weight"]["shape"] = [64, 96]

    edit_header(folder / "model.safetensors", turn)
    message = refusal(folder)
    assert f"{folder / 'model.safetensors'}: tensor model.layers.0.mlp.up_proj.weight" in message
    assert "(64, 96)" in message
    assert "(96, 64)" in message


def test_a_tensor_that_the_family_does_not_know_is_named(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path / "tiny")
    tensors = tiny_tensors(tmp_path, "llama") | {"model.layers.0.self_attn.sinks": np.zeros(4, np.float32)}
    (folder / "model.safetensors").write_bytes(encode_safetensors(tensors))
    assert "model.layers.0.self_attn.sinks" in refusal(folder, UnsupportedModel)


@pytest.mark.parametrize(("dtype", "size"), [("F8_E4M3", 1), ("I8", 1), ("I16", 2), ("U16", 2), ("I32", 4)])
def test_weights_in_a_type_that_nobody_computes_with_are_named(tmp_path: Path, dtype: str, size: int) -> None:
    folder = write_tiny_folder(tmp_path / "tiny")
    name = "model.layers.0.mlp.up_proj.weight"
    header, data = decode_safetensors((folder / "model.safetensors").read_bytes())
    start, end = header[name]["data_offsets"]
    cut = 96 * 64 * size
    header[name] |= {"dtype": dtype, "data_offsets": [start, start + cut]}
    for head in header.values():
        if head.get("data_offsets", [0])[0] >= end:
            head["data_offsets"] = [offset - (end - start - cut) for offset in head["data_offsets"]]
    (folder / "model.safetensors").write_bytes(join_safetensors(header, data[: start + cut] + data[end:]))
    message = refusal(folder, UnsupportedModel)
    assert f"tensor {name} is stored as {dtype}" in message


@pytest.mark.parametrize("name", ["model.safetensors", "model.bin", "model"])
def test_a_file_of_another_format_is_refused_with_what_can_be_named(tmp_path: Path, name: str) -> None:
    folder = write_tiny_folder(tmp_path / "tiny")
    (folder / name).touch()
    assert "Rillet reads .gguf and a folder" in refusal(folder / name, UnsupportedModel)


def test_a_name_that_no_system_can_look_up_is_not_found() -> None:
    with pytest.raises(ModelNotFound, match="cannot be read"):
        open_checkpoint(Path("x" * 5000))


# ---- closing ----------------------------------------------------------------------------------------------------------


def test_a_closed_checkpoint_has_no_tensors_and_lets_go_of_its_files(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny_folder(tmp_path / "tiny", shards=3))
    kept = checkpoint.tensors.tensor("norm").data
    before = kept.copy()
    checkpoint.close()
    checkpoint.close()
    np.testing.assert_array_equal(kept, before)              # a view that somebody kept stays readable
    with pytest.raises(KeyError):
        checkpoint.tensors.tensor("norm")
    assert mapped(tmp_path) == 1
    del kept
    assert mapped(tmp_path) == 0


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", "chat_template.jinja", SHARD])
def test_an_error_anywhere_closes_every_file(tmp_path: Path, name: str) -> None:
    folder = write_tiny_folder(tmp_path / "tiny", shards=3, generation={})
    (folder / name).write_text("{% no json, no template")
    with pytest.raises(ModelError):
        open_checkpoint(folder)
    gc.collect()                           # the error's own frames may look into the files
    assert mapped(tmp_path) == 0


def mapped(folder: Path) -> int:
    """How many files under `folder` this process has mapped, from the kernel; what the caller expects elsewhere."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    lines = Path("/proc/self/maps").read_text().splitlines()
    return len({line.rsplit(" ", 1)[-1] for line in lines if str(folder) in line})
