"""Which files of a repository are the model: names in, names out."""

import pytest

from engine.errors import ModelNotFound
from engine.weights.repository import (
    INDEX,
    choose_variant,
    gguf_variants,
    parts_of,
    safe_names,
    safetensors_files,
)

MANY = [
    "Llama-3.2-1B-Instruct-Q4_K_M.gguf", "Llama-3.2-1B-Instruct-Q4_K_S.gguf", "Llama-3.2-1B-Instruct-Q4_0_4_4.gguf",
    "Llama-3.2-1B-Instruct-IQ4_XS.gguf", "Llama-3.2-1B-Instruct-UD-Q4_K_XL.gguf", "Llama-3.2-1B-Instruct-Q8_0.gguf",
    "Llama-3.2-1B-Instruct-f16.gguf", "README.md", "mmproj-F16.gguf", "Llama-3.2-1B.imatrix.gguf",
]  # fmt: skip


def chosen(names: list[str], tag: str | None = None) -> str:
    return choose_variant(gguf_variants(names), tag, "owner/name")[0].name


@pytest.mark.parametrize(
    ("tag", "end"),
    [
        ("Q4_K_M", "-Q4_K_M.gguf"), ("q4_k_m", "-Q4_K_M.gguf"), ("q8_0", "-Q8_0.gguf"), ("F16", "-f16.gguf"),
        ("IQ4_XS", "-IQ4_XS.gguf"), ("UD-Q4_K_XL", "-UD-Q4_K_XL.gguf"), ("Q4_K_XL", "-UD-Q4_K_XL.gguf"),
    ],
)  # fmt: skip
def test_a_tag_is_a_word_of_the_name_in_any_case(tag: str, end: str) -> None:
    assert chosen(MANY, tag).endswith(end)


@pytest.mark.parametrize("tag", ["Q4_K", "Q4", "Q4_0", "4_K_M", "K_M", "XS", "Q8"])
def test_a_part_of_a_word_is_no_tag(tag: str) -> None:
    with pytest.raises(ModelNotFound, match=rf"no GGUF file is {tag}: there is :F16, :IQ4_XS, :Q4_0_4_4, :Q4_K_M"):
        chosen(MANY, tag)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("qwen2.5-0.5b-instruct-q4_k_m.gguf", "Q4_K_M"), ("Model.Q5_1.gguf", "Q5_1"), ("model_Q8_0.gguf", "Q8_0"),
        ("BF16/model-00001-of-00002.gguf", "BF16"), ("gpt-oss-20b-mxfp4.gguf", "MXFP4"), ("Q4_0/other-Q8_0.gguf", "Q8_0"),
        ("model.gguf", None), ("q3coder.gguf", None), ("Qwen3-F32.GGUF", "F32"), ("x-TQ1_0.gguf", "TQ1_0"),
    ],
)  # fmt: skip
def test_the_name_tells_the_quantization(name: str, label: str | None) -> None:
    assert [variant.label for variant in gguf_variants([name])] == [label]


def test_without_a_tag_the_order_of_preference_decides_and_says_so() -> None:
    variant, note = choose_variant(gguf_variants(MANY), None, "owner/name")
    assert variant.label == "Q4_K_M"
    assert note is not None
    assert "taking Llama-3.2-1B-Instruct-Q4_K_M.gguf" in note
    assert chosen(["x-Q8_0.gguf", "x-Q6_K.gguf", "x-F16.gguf"]) == "x-Q6_K.gguf"
    assert chosen(["x-UD-Q4_K_M.gguf", "x-Q8_0.gguf"]) == "x-UD-Q4_K_M.gguf"
    assert chosen(["b.gguf", "a.gguf"]) == "a.gguf"
    assert choose_variant(gguf_variants(["only-F16.gguf"]), None, "x")[1] is None


def test_two_models_of_one_quantization_are_not_guessed() -> None:
    names = ["small-Q4_K_M.gguf", "large-Q4_K_M.gguf"]
    for tag in ("Q4_K_M", None):
        with pytest.raises(ModelNotFound, match=r"name one with --f: large-Q4_K_M\.gguf, small-Q4_K_M\.gguf"):
            chosen(names, tag)


def test_parts_count_as_one_model_and_must_all_be_there() -> None:
    parts = [f"Q8_0/big-Q8_0-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    variant, _ = choose_variant(gguf_variants([*parts, "big-Q4_0.gguf"]), "Q8_0", "x")
    assert list(variant.files) == parts
    with pytest.raises(ModelNotFound, match=r"1 parts of .* are missing \(Q8_0/big-Q8_0-00003-of-00003.gguf"):
        chosen(parts[:2], "Q8_0")
    assert list(parts_of(parts[1])) == parts


@pytest.mark.parametrize("name", ["a-00000-of-00002.gguf", "a-00003-of-00002.gguf", "a-00001-of-99999.gguf", "a.gguf"])
def test_numbers_that_cannot_be_are_a_name_like_any_other(name: str) -> None:
    assert parts_of(name) == (name,)


def test_names_that_could_leave_a_folder_are_left_out() -> None:
    bad = [
        "", "/etc/passwd", "../x.gguf", "a/../../x", "a//b", "a/./b", "..", "C:\\x", "C:x", "a\\..\\b", "a\0b", "a\nb", "a*",
        "x" * 501, "a/b.", "a /b", "\u202egguf", 3, None,
    ]  # fmt: skip
    good = ["a.gguf", "deep/er/a-b_c.gguf", "modèle.gguf", "a b.json", "..a/b", ".gitattributes"]
    assert safe_names([*bad, *good]) == tuple(good)


BASE = ["config.json", "tokenizer.json", "README.md", "pytorch_model.bin", "original/params.json", "vocab.txt"]


def test_one_file_of_safetensors_counts_before_shards() -> None:
    names = [*BASE, "model.safetensors", "model-00001-of-00001.safetensors", INDEX, "consolidated.safetensors"]
    assert safetensors_files(names, None, "x") == ("config.json", "model.safetensors", "tokenizer.json")


def test_the_index_says_which_shards() -> None:
    names = [*BASE, "b.safetensors", "a.safetensors", "c.safetensors", INDEX, "chat_template.jinja", "tokenizer.model"]
    assert safetensors_files(names, ["b.safetensors", "a.safetensors"], "x") == (
        "config.json", "a.safetensors", "b.safetensors", "chat_template.jinja", INDEX, "tokenizer.json", "tokenizer.model",
    )  # fmt: skip
    with pytest.raises(ModelNotFound, match=r"its index names d\.safetensors"):
        safetensors_files(names, ["d.safetensors"], "x")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["adapter_model.safetensors"], "no config.json beside them"),
        (["config.json", "pytorch_model.bin"], "only pytorch_model.bin: pickles are never loaded"),
        (["README.md"], "neither safetensors nor GGUF"),
        (["config.json", "a.safetensors"], "neither model.safetensors nor"),
    ],
)
def test_what_is_no_model_is_said_why(names: list[str], words: str) -> None:
    with pytest.raises(ModelNotFound, match=words):
        safetensors_files(names, None, "x")
