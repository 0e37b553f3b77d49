"""Sentencepiece vocabularies, from GGUF and from tokenizer.model, against sentencepiece, llama.cpp and transformers.

The golden tokens come from tests/golden/make_tokenizers.py.
"""

import json
import struct
import time
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import BadModelFile, UnsupportedModel
from engine.text.detokenizer import Detokenizer
from engine.text.gguf_values import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from engine.text.gguf_vocabulary import read_gguf_tokenizer
from engine.text.sentencepiece import Piece
from engine.text.sentencepiece_model import read_sentencepiece_model
from engine.text.tokenizer import Tokenizer
from engine.text.tokenizer_files import read_folder_tokenizer

GOLDEN_FOLDER = Path(__file__).parent.parent / "golden"
GOLDEN = json.loads((GOLDEN_FOLDER / "tokenizers.json").read_text())
WORDS, TEXTS = GOLDEN["sentencepiece"], GOLDEN["texts"]
ROWS = len(WORDS["tokens"])
IDS = {text: token for token, text in enumerate(WORDS["tokens"])}


def from_gguf(architecture: str = "llama", **changes: object) -> Tokenizer:
    """The golden vocabulary; `changes` by what follows tokenizer.ggml., None leaves a key out."""
    keys = {
        "model": "llama",
        "tokens": WORDS["tokens"],
        "scores": WORDS["scores"],
        "token_type": WORDS["types"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    } | changes
    values = {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}
    return read_gguf_tokenizer({"general.architecture": architecture, **values}, "m.gguf", ROWS)


def from_model(tmp_path: Path, name: str, **config: object) -> Tokenizer:
    (tmp_path / "tokenizer.model").write_bytes((GOLDEN_FOLDER / "tokenizers" / f"{name}.model").read_bytes())
    if config:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return read_folder_tokenizer(tmp_path, ROWS + 8, frozenset())


@pytest.mark.parametrize("space_prefix", ["with", "without"])
def test_a_gguf_vocabulary_has_the_tokens_of_llama_cpp(space_prefix: str) -> None:
    tokenizer = from_gguf(add_space_prefix=space_prefix == "with")
    for text, expected in zip(TEXTS, GOLDEN["gguf"][space_prefix]["llama.cpp"], strict=True):
        assert tokenizer.encode(text, add_special=False) == expected, text


def test_transformers_agrees_where_it_puts_the_space_prefix_in_the_same_places() -> None:
    # It puts none before a text that begins with a space, and none behind a marker; sentencepiece and llama.cpp do.
    tokenizer, compared = from_gguf(), 0
    for text, expected in zip(TEXTS, GOLDEN["gguf"]["with"]["transformers"], strict=True):
        if not text.startswith((" ", "\u2581", "<")) and not any(marker in text for marker in ("<|im", "<think>", "</s>")):
            assert tokenizer.encode(text) == expected, text
            compared += 1
    assert compared >= 35


@pytest.mark.parametrize("name", ["bpe", "unigram"])
def test_a_model_file_has_the_tokens_of_sentencepiece(tmp_path: Path, name: str) -> None:
    tokenizer, compared = from_model(tmp_path, name), 0
    for text, expected in zip(TEXTS, GOLDEN["models"][name], strict=True):
        if expected is not None:
            ids = tokenizer.encode(text, add_special=False)
            if name == "unigram":                             # of equally likely cuts either may come out
                ids, expected = sorted(ids), sorted(expected)
            assert ids == expected, text
            compared += 1
    assert compared >= 40


def test_a_model_file_and_a_gguf_file_of_one_vocabulary_are_one_tokenizer(tmp_path: Path) -> None:
    one, other = from_model(tmp_path, "bpe"), from_gguf()
    assert one.pieces[:ROWS] == other.pieces
    assert one.pieces[ROWS:] == (b"",) * 8
    assert (one.special_ids, one.end_ids, one.bos_id, one.eos_id) == (other.special_ids, other.end_ids, 1, 2)
    assert [one.encode(text) for text in TEXTS] == [other.encode(text) for text in TEXTS]


@given(st.text(max_size=60))
def test_any_text_comes_back_whole(text: str) -> None:
    tokenizer = from_gguf()
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("\u2581", " ")      # ▁ is how a space is written


def test_golden_texts_come_back_whole() -> None:
    tokenizer = from_gguf()
    for text in TEXTS:
        if not any(WORDS["tokens"][token] in text for token in (0, 1, 2, 3, 4, 5)):      # a space follows a marker
            assert tokenizer.decode(tokenizer.encode(text)) == text.replace("\u2581", " ")


def test_every_piece_has_its_exact_bytes() -> None:
    tokenizer = from_gguf()
    assert tokenizer.pieces[IDS["<0xE4>"]] == b"\xe4"
    assert tokenizer.pieces[IDS["\u2581"]] == b" "
    assert tokenizer.pieces[IDS["<s>"]] == b"<s>"
    assert tokenizer.special_ids == {0, 1, 2, IDS["<|im_start|>"], IDS["<|im_end|>"]}
    assert tokenizer.decode([IDS["<think>"]]) == "<think>"
    assert tokenizer.end_ids == {2, IDS["<|im_end|>"]}


def test_bytes_over_several_tokens_join_into_characters_when_streamed() -> None:
    detokenizer = Detokenizer(from_gguf())
    pushed = [detokenizer.push(IDS[f"<0x{byte:02X}>"]) for byte in "ä🙂".encode()]
    assert pushed == ["", "ä", "", "", "", "🙂"]
    assert detokenizer.finish() == ""


def test_an_answers_first_space_is_streamed_so_that_it_continues_the_prompt() -> None:
    tokenizer = from_gguf()
    prompt, whole = tokenizer.encode("The words"), tokenizer.encode("The words are")
    assert whole[: len(prompt)] == prompt
    detokenizer = Detokenizer(tokenizer)
    answer = "".join(detokenizer.push(token) for token in whole[len(prompt) :]) + detokenizer.finish()
    assert answer == " are"                                   # as vLLM and llama.cpp show it
    assert tokenizer.decode(whole) == "The words are"


def test_the_defaults_are_those_of_llama_2() -> None:
    tokenizer = from_gguf(bos_token_id=None, eos_token_id=None, unknown_token_id=None)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.encode("a") == [1, *tokenizer.encode("a", add_special=False)]
    assert from_gguf(add_bos_token=False).encode("a")[0] != 1
    assert from_gguf(add_eos_token=True).encode("a")[-1] == 2
    assert from_gguf(bos_token_id=0xFFFFFFFF).bos_id is None


def test_a_character_without_a_piece_becomes_bytes_or_the_unknown_token() -> None:
    tokenizer = from_gguf()
    assert [tokenizer.pieces[token] for token in tokenizer.encode("\U00020bb7", add_special=False)][1:] == [
        bytes([byte]) for byte in "\U00020bb7".encode()
    ]
    types = [NORMAL if kind == BYTE else kind for kind in WORDS["types"]]
    tokens = [f"no byte {token}" if kind == BYTE else text
              for token, (text, kind) in enumerate(zip(WORDS["tokens"], WORDS["types"], strict=True))]
    assert from_gguf(tokens=tokens, token_type=types).encode("\U00020bb7", add_special=False)[1:] == [0]
    with pytest.raises(BadModelFile, match="unknown characters"):
        from_gguf(tokens=tokens, token_type=types, unknown_token_id=0xFFFFFFFF)


def test_phi3_swallows_the_spaces_behind_its_markers() -> None:
    text = "<|im_end|>\n  x<s> y"
    ids = from_gguf("phi3").encode(text)
    assert ids == from_gguf().encode("<|im_end|>x<s> y")


def test_tokens_added_behind_a_model_file_are_read_from_the_settings(tmp_path: Path) -> None:
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_new|>": ROWS + 2, "<tool>": ROWS}))
    tokenizer = from_model(tmp_path, "bpe", eos_token={"content": "<|im_new|>"}, add_bos_token=False)
    assert tokenizer.encode("<tool><|im_new|>") == [ROWS, ROWS + 2]
    assert tokenizer.eos_id == ROWS + 2
    assert ROWS + 2 in tokenizer.end_ids & tokenizer.special_ids
    assert tokenizer.decode([ROWS, ROWS + 1, ROWS + 2]) == "<tool>"


def test_settings_may_rename_placeholders_and_leave_the_first_space_out(tmp_path: Path) -> None:
    place = IDS["\u2581The"] if "\u2581The" in IDS else ROWS - 1
    listed = {str(place): {"content": "<|tool|>", "special": True}, "5": {"content": "<s>", "special": False}}
    tokenizer = from_model(tmp_path, "bpe", added_tokens_decoder=listed, add_prefix_space=False, eos_token="</s>")
    assert tokenizer.encode("a<|tool|>", add_special=False) == [IDS["a"], place]
    assert place in tokenizer.special_ids
    assert tokenizer.pieces[5] == b"<think>"                  # a name that another token has is not given twice
    assert tokenizer.decode(tokenizer.encode(" a")) == " a"


@pytest.mark.parametrize("piece", ["a", " ", "=", "\U0001fae0", "ab ", "\n", "1"])
def test_very_long_texts_are_encoded_in_linear_time(tmp_path: Path, piece: str) -> None:
    for tokenizer in (from_gguf(), from_model(tmp_path, "unigram")):
        began = time.perf_counter()
        tokenizer.encode(piece * (200_000 // len(piece)))
        assert time.perf_counter() - began < 10.0             # measured 0.1 to 0.4 s; a quadratic search takes an hour


def test_a_vocabulary_of_32000_pieces_is_read_fast() -> None:
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256]
    letters = [chr(ord("a") + n) for n in range(26)]
    pairs = [a + b for a in letters for b in letters]
    words += letters + pairs + [pair + letter for pair in pairs for letter in letters]
    words += ["\u2581" + word for word in words[-14_000:]]
    words = list(dict.fromkeys(words))
    values = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": kinds + [NORMAL] * (len(words) - len(kinds)),
        "tokenizer.ggml.scores": [-float(token) for token in range(len(words))],
    }
    began = time.perf_counter()
    read_gguf_tokenizer(values, "m.gguf", len(words))
    assert time.perf_counter() - began < 2.0                  # measured 0.2 s
    assert len(words) > 30_000


DAMAGED: list[tuple[dict[str, object], str]] = [
    ({"scores": None}, "scores"),
    ({"scores": [0.0]}, "scores has 1 entries"),
    ({"scores": ["1"] * ROWS}, "scores"),
    ({"scores": [float("nan")] * ROWS}, "scores"),
    ({"tokens": [*WORDS["tokens"][:-1], WORDS["tokens"][-2]]}, "twice"),
    ({"tokens": [*WORDS["tokens"][:-1], "x" * 2000]}, "2,000 characters"),
    ({"tokens": [f"{n}" + "x" * 60_000 for n in range(200)], "scores": [0.0] * 200, "token_type": [3] * 200}, "characters"),
    ({"token_type": [*WORDS["types"][:-1], BYTE]}, "<0x0A>"),
    ({"unknown_token_id": ROWS}, "unknown_token_id"),
    ({"add_space_prefix": 1}, "add_space_prefix"),
]


@pytest.mark.parametrize(("changes", "words"), DAMAGED, ids=[f"{words} {i}" for i, (_, words) in enumerate(DAMAGED)])
def test_a_contradictory_vocabulary_is_a_damaged_file(changes: dict[str, object], words: str) -> None:
    with pytest.raises(BadModelFile, match=words):
        from_gguf(**changes)


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    groups = []
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


def piece(text: bytes, score: float = 0.0, kind: int = NORMAL) -> bytes:
    return field(1, field(1, text) + varint(2 << 3 | 5) + struct.pack("<f", score) + field(3, kind))


def test_a_model_files_fields_are_read_by_their_numbers() -> None:
    trainer = field(2, field(3, 2) + field(40, 1) + field(41, (1 << 64) - 1) + field(42, 0))
    normalizer = field(3, field(1, b"identity") + field(3, 0) + field(4, 0))
    data = piece(b"a", -1.5) + piece(b"<unk>", kind=UNKNOWN) + trainer + normalizer + field(9, b"unknown")
    model = read_sentencepiece_model(data, "m")
    assert model.pieces == [Piece("a", -1.5, NORMAL), Piece("<unk>", 0.0, UNKNOWN)]
    assert (model.unknown_id, model.bos_id, model.eos_id) == (1, None, 0)
    assert (model.unigram, model.space_prefix, model.squeeze_spaces) == (False, False, False)


@pytest.mark.parametrize("kind", [USER_DEFINED, CONTROL])
def test_a_model_file_without_settings_adds_its_begin_token(tmp_path: Path, kind: int) -> None:
    data = b"".join([piece(b"<unk>", kind=UNKNOWN), piece(b"<s>", kind=CONTROL), piece(b"</s>", kind=kind), piece(b"a")])
    (tmp_path / "tokenizer.model").write_bytes(data + field(2, field(3, 2)) + field(3, field(3, 0)))
    assert read_folder_tokenizer(tmp_path, 9, frozenset()).encode("a") == [1, 3]


BROKEN: list[tuple[bytes, str]] = [
    (b"", "no pieces"),
    (b"IQ== 0\nIg== 1\n", "no pieces"),              # Llama 3's, a list of base64
    (b"\xff" * 40, "does not end"),
    (varint(1 << 3 | 2) + varint(1 << 60), "announced"),
    (varint(1 << 3 | 3), "unknown kind"),
    (piece(b"a", float("nan")), "score"),
    (piece(b"a", kind=77), "type 77"),
    (field(1, field(1, 5)), "wrong types"),
]


@pytest.mark.parametrize(("data", "words"), BROKEN, ids=[str(i) for i in range(len(BROKEN))])
def test_a_damaged_model_file_is_named_so(data: bytes, words: str) -> None:
    with pytest.raises(BadModelFile, match=words):
        read_sentencepiece_model(data, "tokenizer.model")


def test_a_model_file_that_maps_characters_or_cuts_words_is_refused() -> None:
    for extra in (field(3, field(2, b"map")), field(2, field(24, 1)), field(2, field(3, 3)), field(3, field(5, 0))):
        with pytest.raises(UnsupportedModel, match=r"tokenizer\.json"):
            read_sentencepiece_model(piece(b"a") + extra, "m")


def test_a_vocabulary_with_too_many_merges_is_refused() -> None:
    tokens = ["<unk>", *("a" * length for length in range(1, 601))]          # 180 thousand merges of 72 million characters
    kinds = [UNKNOWN, *[NORMAL] * 600]
    with pytest.raises(BadModelFile, match="merges"):
        from_gguf(tokens=tokens, scores=[0.0] * 601, token_type=kinds, bos_token_id=0, eos_token_id=0)


@pytest.mark.parametrize(("data", "words"), [
    (field(7, 0) * 65, "64 fields beside"),
    (field(1, field(7, 0) * 17), "16 fields"),
    (field(2, field(7, 0) * 65_537), "65,536 fields"),
    (field(2, b"") * 3, "settings more than once"),
])
def test_a_model_file_with_too_many_fields_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(BadModelFile, match=words):
        read_sentencepiece_model(piece(b"a") + data, "m")


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with suppress(BadModelFile, UnsupportedModel):
        read_sentencepiece_model(piece(b"a") + data, "m")
