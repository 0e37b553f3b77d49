"""A GGUF vocabulary (`tokenizer.ggml.*`) -> Tokenizer. The one place that knows how llama.cpp names tokenizers.

checkpoint.py calls read_gguf_tokenizer(). Byte-level BPE (`gpt2`) is here; another `tokenizer.ggml.model` becomes another
function in KINDS. A split pattern that is not known is refused: a wrong one gives plausible text from a crippled model.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import cast

from tokenizers import AddedToken, Regex, models, pre_tokenizers
from tokenizers import Tokenizer as TokenizerBackend

from engine.errors import BadModelFile, UnsupportedModel
from engine.text.byte_alphabet import spelled_bytes
from engine.text.split_patterns import SPLITS, Split
from engine.text.tokenizer import Tokenizer

__all__ = ["read_gguf_tokenizer"]

PREFIX = "tokenizer.ggml."
CURE = "download the file again, or take another conversion"
MAX_TOKEN_CHARACTERS = 1 << 16

# GGUF's token types
UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 2, 3, 4, 5

# Tokens that end a turn whatever the file calls its eos, found by their text as llama.cpp does. The first row is a
# marker even where a converter forgot to say so; texts of the second row are ordinary words in some vocabularies.
END_MARKERS = frozenset({
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<|return|>", "<|call|>",
    "<｜end▁of▁sentence｜>",
})
END_WORDS = frozenset({"</s>", "<eos>", "<EOT>", "[EOT]", "[EOS]", "<end_of_turn>", "<end_of_utterance>"})


def read_gguf_tokenizer(values: Mapping[str, object], file: str, rows: int) -> Tokenizer:
    """The tokenizer in a GGUF file's metadata; `rows` of the embedding bound its ids.

    Raises BadModelFile for what contradicts itself, UnsupportedModel for a kind or a split that is not known.
    """
    kind = values.get(PREFIX + "model")
    if not isinstance(kind, str):
        raise BadModelFile(f"{PREFIX}model is {kind!r}, it must name a tokenizer: {CURE}", file=file)
    if kind not in KINDS:
        raise UnsupportedModel(
            f"{file}: its tokenizer is of the kind {kind[:40]!r}, Rillet reads {', '.join(sorted(KINDS))} from GGUF: take "
            "another model"
        )
    return KINDS[kind](_Values(values, file), rows)


class _Values:
    """Typed reading of `tokenizer.ggml.*`."""

    def __init__(self, values: Mapping[str, object], file: str) -> None:
        self.values = values
        self.file = file

    def bad(self, key: str, message: str) -> BadModelFile:
        return BadModelFile(f"{PREFIX}{key} {message}: {CURE}", file=self.file)

    def texts(self, key: str) -> list[str]:
        value = self.values.get(PREFIX + key)
        if not isinstance(value, list) or not value or not all(type(each) is str for each in value):
            raise self.bad(key, "must be a list of texts")
        return cast(list[str], value)

    def types(self, count: int) -> Sequence[int]:
        value = self.values.get(PREFIX + "token_type", [1] * count)
        if not isinstance(value, list) or not all(type(each) is int for each in value):
            raise self.bad("token_type", "must be a list of integers")
        if len(value) != count:
            raise self.bad("token_type", f"has {len(value):,} entries for {count:,} tokens")
        return cast(list[int], value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(PREFIX + key, default)
        if not isinstance(value, bool):
            raise self.bad(key, f"is {value!r}, it must be true or false")
        return value

    def token(self, key: str, count: int) -> int | None:
        value = self.values.get(f"{PREFIX}{key}_token_id")
        if value is None or value == 0xFFFFFFFF:               # some converters write "none" so
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
            raise self.bad(f"{key}_token_id", f"is {value!r}, ids go from 0 to {count - 1:,}")
        return value


def _byte_level_bpe(values: _Values, rows: int) -> Tokenizer:
    split = _split(values)
    texts = _unique(values, values.texts("tokens"), rows)
    kinds = [CONTROL if text in END_MARKERS else kind for text, kind in zip(texts, values.types(len(texts)), strict=True)]
    backend = _backend(values, texts, kinds, split)
    bos = values.token("bos", len(texts))
    eos = values.token("eos", len(texts))
    ends = {eos, values.token("eot", len(texts)), values.token("eom", len(texts))} - {None}
    ends |= {
        token
        for token, (text, kind) in enumerate(zip(texts, kinds, strict=True))
        if kind == CONTROL and (text in END_MARKERS or text in END_WORDS)
    }
    return Tokenizer(
        backend,
        pieces=tuple(_piece(text, kind) for text, kind in zip(texts, kinds, strict=True)) + (b"",) * (rows - len(texts)),
        special_ids=frozenset(token for token, kind in enumerate(kinds) if kind in (CONTROL, UNKNOWN)),
        bos_id=bos,
        eos_id=eos,
        end_ids=frozenset(cast(set[int], ends)),
        add_bos=values.flag("add_bos_token", split.add_bos),
        add_eos=values.flag("add_eos_token", False),
    )


def _split(values: _Values) -> Split:
    name = values.values.get(PREFIX + "pre", "default")
    if not isinstance(name, str) or name not in SPLITS:
        raise UnsupportedModel(
            f"{values.file}: {PREFIX}pre is {str(name)[:40]!r}, Rillet knows {', '.join(sorted(SPLITS))}: upgrade Rillet, or "
            "take another model"
        )
    return SPLITS[name]


def _unique(values: _Values, texts: list[str], rows: int) -> list[str]:
    """The tokens' texts, the empty ones renamed as llama.cpp does; twice the same text would make an id unreachable."""
    if len(texts) > rows:
        raise values.bad("tokens", f"has {len(texts):,} entries, the embedding has {rows:,} rows")
    named = [text or f"[EMPTY_{token}]" for token, text in enumerate(texts)]
    if len(set(named)) != len(named):
        seen: set[str] = set()
        double = next(text for text in named if text in seen or seen.add(text))   # type: ignore[func-returns-value]
        raise values.bad("tokens", f"has {double[:40]!r} twice")
    if (longest := max(map(len, named))) > MAX_TOKEN_CHARACTERS:
        raise values.bad("tokens", f"has a token of {longest:,} characters, {MAX_TOKEN_CHARACTERS:,} are allowed")
    return named


def _backend(values: _Values, texts: list[str], kinds: Sequence[int], split: Split) -> TokenizerBackend:
    vocabulary = {text: token for token, text in enumerate(texts)}
    merges: list[tuple[str, str]] = []
    for merge in values.texts("merges"):
        left, _, right = merge.partition(" ")
        if not left or not right or " " in right:
            raise values.bad("merges", f"has {merge[:40]!r}, it must be two parts with a space between")
        merges.append((left, right))
    try:
        model = models.BPE(vocabulary, merges, ignore_merges=split.ignore_merges)
    except Exception as error:             # tokenizers raises bare Exceptions: a part that is no token, and the like
        raise values.bad("merges", f"does not fit the tokens ({error})") from error
    except BaseException as error:         # its Rust code panics where the two parts together are no token
        if type(error).__name__ != "PanicException":
            raise
        raise values.bad("merges", "makes a token that is not in the list") from None
    backend = TokenizerBackend(model)
    steps = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in split.patterns]
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, spell])
    marked = [(text, kind) for text, kind in zip(texts, kinds, strict=True) if kind in (UNKNOWN, CONTROL, USER_DEFINED)]
    backend.add_special_tokens([AddedToken(text, normalized=False) for text, kind in marked if kind != USER_DEFINED])
    backend.add_tokens([AddedToken(text, normalized=False) for text, kind in marked if kind == USER_DEFINED])
    return backend


def _piece(text: str, kind: int) -> bytes:
    """What a token writes. Marked tokens stand for their own text; unused ones are padding of the table."""
    if kind in (UNKNOWN, CONTROL, USER_DEFINED):
        return text.encode("utf-8", "replace")
    return b"" if kind == UNUSED else spelled_bytes(text)


KINDS: dict[str, Callable[[_Values, int], Tokenizer]] = {"gpt2": _byte_level_bpe}
