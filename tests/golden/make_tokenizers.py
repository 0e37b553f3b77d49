"""Makes tokenizers.json and tokenizers/*.model: hard texts tokenized with vocabularies other than a GGUF's byte-level BPE.

Two sentencepiece models are trained here on the texts, as Llama 2's was (BPE) and as a unigram model. The BPE one is
tokenized by sentencepiece itself, by llama.cpp and transformers from a GGUF file, and by transformers from tokenizer.json
files made in the manner of Llama 2 and Mistral; byte-level ones in the manner of Qwen and Llama 3 take make_tokens.py's
vocabulary. Run with a Python that has transformers, torch, gguf and sentencepiece, and name one with llama-cpp-python:

    python tests/golden/make_tokenizers.py --peer /tmp/peer/bin/python
"""

import argparse
import io
import json
import subprocess
import tempfile
from pathlib import Path

from make_tokens import TEXTS

HERE = Path(__file__).parent
FOLDER = HERE / "tokenizers"
SPECIAL = ["<|im_start|>", "<|im_end|>"]
MORE = (
    "a<think>b</s>c",
    " <|im_start|> x<|im_end|>  y",
    "<s>[INST] Hi [/INST] Sure </s><s>[INST] Bye [/INST]",
    "\u2581 \u2581\u2581x",
    "<0x0A> <unk> <pad>",
    " one space first",
    "   three",
    "one space last ",
    "=" * 61 + "\n" + "-" * 37 + "\n" + " " * 29 + "x" + "  " * 9 + "yy",
    "aaab aabaa baaab abab" * 5,
    "\u0645\u064f\u062f\u0652\u0646 \U0001fae0 \U00020bb7\u91ce\u5bb6",
)
ALL = TEXTS + MORE


def train(kind: str, **options: object) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in TEXTS * 3 for line in text.split("\n") if line and "\0" not in line]),
        model_writer=model, model_type=kind, byte_fallback=True, normalization_rule_name="identity", split_digits=True,
        allow_whitespace_only_pieces=True, character_coverage=0.98, control_symbols=SPECIAL, minloglevel=2, num_threads=1,
        user_defined_symbols=["<think>"], **options,
    )
    return model.getvalue()


def by_sentencepiece(data: bytes) -> list[list[int] | None]:
    """None for texts with markers, which sentencepiece takes for plain text."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_proto=data)
    marked = [any(marker in text for marker in (*SPECIAL, "<think>", "<s>", "</s>", "<unk>")) for text in ALL]
    return [None if mark or "\0" in text else model.encode(text) for text, mark in zip(ALL, marked, strict=True)]


def vocabulary(data: bytes) -> dict[str, list]:
    import sentencepiece
    from transformers.convert_slow_tokenizer import generate_merges

    model = sentencepiece.SentencePieceProcessor(model_proto=data)
    ids = range(model.get_piece_size())
    kinds = [
        2 if model.is_unknown(token) else 3 if model.is_control(token) else 6 if model.is_byte(token)
        else 4 if model.id_to_piece(token) == "<think>" else 1
        for token in ids
    ]  # fmt: skip
    tokens = [model.id_to_piece(token) for token in ids]
    scores = [model.get_score(token) for token in ids]
    merges = generate_merges({text: token for token, text in enumerate(tokens)}, dict(zip(tokens, scores, strict=True)))
    return {"tokens": tokens, "scores": scores, "types": kinds, "merges": [list(merge) for merge in merges]}


def write_gguf(target: Path, words: dict[str, list], space_prefix: bool) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(target, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_feed_forward_length(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words["tokens"])
    writer.add_token_scores(words["scores"])
    writer.add_token_types(words["types"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_space_prefix(space_prefix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def by_transformers(folder: Path, **options: str) -> dict[str, list]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    ids = [tokenizer.encode(text) for text in ALL]
    return {"ids": ids, "texts": [tokenizer.decode(each, skip_special_tokens=True) for each in ids]}


def by_llama_cpp(path: Path) -> list[list[int]]:
    from llama_cpp import Llama

    model = Llama(str(path), vocab_only=True, verbose=False)
    return [model.tokenize(text.encode(), add_bos=False, special=True) for text in ALL]


def added(token: int, text: str, special: bool = True) -> dict[str, object]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    return {"id": token, "content": text, **flags}


def skeletons() -> dict[str, dict]:
    """name -> what a tokenizer.json and a tokenizer_config.json say beside the vocabulary; `words` names that."""
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2

    llama3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")
    text = {"Sequence": {"id": "A", "type_id": 0}}

    def template(*items: object, **ids: int) -> dict:
        names = {name: {"id": name, "ids": [token], "tokens": [name]} for name, token in ids.items()}
        parts = [{"SpecialToken": {"id": item, "type_id": 0}} if isinstance(item, str) else item for item in items]
        return {"type": "TemplateProcessing", "single": parts, "pair": [*parts, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": names}

    def split(pattern: str) -> dict:
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        first = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        return {"type": "Sequence", "pretokenizers": [first, byte_level]}

    spaces = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    decoder = {"type": "Sequence", "decoders": [spaces, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]}
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, replace]}
    marks = [added(0, "<unk>"), added(1, "<s>"), added(2, "</s>"), added(3, "<|im_start|>"), added(4, "<|im_end|>"),
             added(5, "<think>", special=False)]
    bpe = {"type": "BPE", "dropout": None, "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    begin = template("<s>", text, **{"<s>": 1})
    pieces = {"words": "sentencepiece", "added_tokens": marks, "normalizer": None, "pre_tokenizer": None,
              "decoder": decoder, "post_processor": begin, "model": bpe}
    ends = {"bos_token": "<s>", "eos_token": {"content": "</s>", "__type": "AddedToken", "special": True}}
    spelled = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    marks = [added(0, "<|endoftext|>"), added(1, "<|im_start|>"), added(2, "<|im_end|>")]
    bpe = {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False}
    bytes_ = {"words": "glue", "added_tokens": marks, "normalizer": {"type": "NFC"}, "pre_tokenizer": split(QWEN2),
              "decoder": spelled, "post_processor": spelled, "model": bpe}
    start = template("<|im_start|>", text, **{"<|im_start|>": 1})
    cut = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    fill = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
            "pad_token": "<|endoftext|>"}
    sequence = {"type": "Sequence", "processors": [spelled, start]}
    return {
        "llama2": {**pieces, "normalizer": prepend, "config": {**ends, "legacy": False}},
        "mistral": {**pieces, "pre_tokenizer": metaspace,
                    "config": {**ends, "add_bos_token": True, "add_eos_token": False}},
        "metaspace decoder": {**pieces, "pre_tokenizer": {**metaspace, "prepend_scheme": "always"},
                              "decoder": {**metaspace, "prepend_scheme": "always"}, "config": ends,
                              "model": {**pieces["model"], "byte_fallback": False}},
        "settings against the file": {**pieces, "normalizer": replace,
                                      "config": {**ends, "add_bos_token": False, "add_eos_token": True}},
        "qwen2": {**bytes_, "config": {"bos_token": None, "eos_token": "<|im_end|>", "add_bos_token": False}},
        "llama3": {**bytes_, "normalizer": None, "pre_tokenizer": split(llama3), "post_processor": sequence,
                   "model": {**bpe, "ignore_merges": True}, "truncation": cut, "padding": fill,
                   "config": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}},
        "settings without the file": {**bytes_, "post_processor": None,
                                      "config": {"bos_token": "<|im_start|>", "add_bos_token": True}},
        "two before, one behind": {
            **bytes_, "post_processor": template("<|im_start|>", "<|endoftext|>", text, "<|im_end|>",
                                                 **{"<|im_start|>": 1, "<|endoftext|>": 0, "<|im_end|>": 2}),
            "config": {"bos_token": "<|im_start|>"}},
    }  # fmt: skip


def write_folder(folder: Path, skeleton: dict, words: dict[str, list]) -> None:
    """tokenizer.json and tokenizer_config.json; tests/unit/test_tokenizer_files.py does the same."""
    whole = {"version": "1.0", "truncation": None, "padding": None, **skeleton}
    del whole["words"], whole["config"]
    ids = {text: token for token, text in enumerate(words["tokens"])}
    whole["model"] = {**skeleton["model"], "vocab": ids, "merges": words["merges"]}
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **skeleton["config"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", help="a Python that has llama-cpp-python")
    parser.add_argument("--llama-cpp", type=Path, help="(the peer's half) print the tokens of this file")
    options = parser.parse_args()
    if options.llama_cpp:
        print(json.dumps(by_llama_cpp(options.llama_cpp)))
        return
    FOLDER.mkdir(exist_ok=True)
    bpe = train("bpe", vocab_size=1000, remove_extra_whitespaces=False)
    unigram = train("unigram", vocab_size=600, remove_extra_whitespaces=True)
    (FOLDER / "bpe.model").write_bytes(bpe)
    (FOLDER / "unigram.model").write_bytes(unigram)
    pieces = vocabulary(bpe)
    result: dict = {
        "texts": ALL,
        "sentencepiece": pieces,
        "models": {"bpe": by_sentencepiece(bpe), "unigram": by_sentencepiece(unigram)},
        "gguf": {},
        "folders": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        for name, space_prefix in (("with", True), ("without", False)):
            write_gguf(path, pieces, space_prefix)
            peer = [options.peer, __file__, "--llama-cpp", path]
            output = subprocess.run(peer, capture_output=True, text=True, check=True).stdout
            result["gguf"][name] = {"llama.cpp": json.loads(output.splitlines()[-1])}
            if space_prefix:                   # transformers pays no heed to the flag
                result["gguf"][name]["transformers"] = by_transformers(path.parent, gguf_file=path.name)["ids"]
    glue = json.loads((HERE / "tokens.json").read_text())
    words = {"sentencepiece": pieces, "glue": {"tokens": glue["tokens"], "merges": [m.split(" ") for m in glue["merges"]]}}
    for name, skeleton in skeletons().items():
        with tempfile.TemporaryDirectory() as folder:
            write_folder(Path(folder), skeleton, words[skeleton["words"]])
            result["folders"][name] = {"skeleton": skeleton, **by_transformers(Path(folder))}
    lines = [f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in result.items()]
    (HERE / "tokenizers.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
