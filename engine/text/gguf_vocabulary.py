"""A GGUF vocabulary (`tokenizer.ggml.*`) -> Tokenizer. The one place that knows how llama.cpp names tokenizers.

checkpoint.py calls read_gguf_tokenizer(). Byte-level BPE (`gpt2`) and sentencepiece BPE (`llama`) are here; another
`tokenizer.ggml.model` becomes another function in KINDS. A split pattern that is not known is refused: a wrong one gives
plausible text from a crippled model.
"""

from collections.abc import Callable, Mapping, Sequence

from tokenizers import AddedToken, Regex, models, pre_tokenizers
from tokenizers import Tokenizer as TokenizerBackend

from engine.errors import BadModelFile, UnsupportedModel
from engine.text.byte_alphabet import spelled_bytes
from engine.text.end_tokens import END_MARKERS, end_tokens
from engine.text.gguf_values import CONTROL, CURE, PREFIX, UNKNOWN, UNUSED, USER_DEFINED, GgufValues
from engine.text.sentencepiece import Piece, sentencepiece_tokenizer
from engine.text.split_patterns import SPLITS, Split
from engine.text.tokenizer import Tokenizer

__all__ = ["read_gguf_tokenizer"]


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
    return KINDS[kind](GgufValues(values, file), rows)


def _byte_level_bpe(values: GgufValues, rows: int) -> Tokenizer:
    split = _split(values)
    texts = values.tokens(rows)
    kinds = _marked_ends(texts, values.types(len(texts)))
    backend = _backend(values, texts, kinds, split)
    bos, eos = values.token("bos", len(texts)), values.token("eos", len(texts))
    return Tokenizer(
        backend,
        pieces=tuple(_piece(text, kind) for text, kind in zip(texts, kinds, strict=True)) + (b"",) * (rows - len(texts)),
        special_ids=frozenset(token for token, kind in enumerate(kinds) if kind in (CONTROL, UNKNOWN)),
        bos_id=bos,
        eos_id=eos,
        end_ids=_end_ids(values, texts, kinds, eos),
        prefix=_added("bos", bos, values, split.add_bos),
        suffix=_added("eos", eos, values, False),
    )


def _sentencepiece_bpe(values: GgufValues, rows: int) -> Tokenizer:
    texts = values.tokens(rows)
    count = len(texts)
    kinds, scores = _marked_ends(texts, values.types(count)), values.scores(count)
    # llama.cpp's defaults are those of Llama 2
    bos, eos, unknown = values.token("bos", count, 1), values.token("eos", count, 2), values.token("unknown", count, 0)
    return sentencepiece_tokenizer(
        [Piece(*piece) for piece in zip(texts, scores, kinds, strict=True)],
        file=values.file,
        rows=rows,
        unknown_id=unknown,
        bos_id=bos,
        eos_id=eos,
        end_ids=_end_ids(values, texts, kinds, eos),
        prefix=_added("bos", bos, values, True),
        suffix=_added("eos", eos, values, False),
        space_prefix=values.flag("add_space_prefix", True),
        # Phi-3's own tokenizer swallows the spaces behind its markers; GGUF has no key for it
        strip_behind_markers=values.values.get("general.architecture") == "phi3",
    )


def _added(name: str, token: int | None, values: GgufValues, default: bool) -> tuple[int, ...]:
    """The begin or end token as what goes around a text."""
    wanted = values.flag(f"add_{name}_token", default)
    return (token,) if wanted and token is not None else ()


def _marked_ends(texts: Sequence[str], kinds: Sequence[int]) -> list[int]:
    return [CONTROL if text in END_MARKERS else kind for text, kind in zip(texts, kinds, strict=True)]


def _end_ids(values: GgufValues, texts: Sequence[str], kinds: Sequence[int], eos: int | None) -> frozenset[int]:
    named = (eos, values.token("eot", len(texts)), values.token("eom", len(texts)))
    special = {text: token for token, (text, kind) in enumerate(zip(texts, kinds, strict=True)) if kind == CONTROL}
    return end_tokens(special) | frozenset(token for token in named if token is not None)


def _split(values: GgufValues) -> Split:
    name = values.values.get(PREFIX + "pre", "default")
    if not isinstance(name, str) or name not in SPLITS:
        raise UnsupportedModel(
            f"{values.file}: {PREFIX}pre is {str(name)[:40]!r}, Rillet knows {', '.join(sorted(SPLITS))}: upgrade Rillet, or "
            "take another model"
        )
    return SPLITS[name]


def _backend(values: GgufValues, texts: list[str], kinds: Sequence[int], split: Split) -> TokenizerBackend:
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


KINDS: dict[str, Callable[[GgufValues, int], Tokenizer]] = {"gpt2": _byte_level_bpe, "llama": _sentencepiece_bpe}
