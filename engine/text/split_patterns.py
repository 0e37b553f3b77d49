r"""The split patterns of byte-level tokenizers: which pieces of a text are never merged with one another.

A table from llama.cpp's name (`tokenizer.ggml.pre`) to what the model's own tokenizer.json does. A pattern cuts every
piece that the one before left over into its matches and the gaps between them. `\p{..}` are Unicode categories.
"""

from dataclasses import dataclass

__all__ = ["SPLITS", "Split"]


@dataclass(frozen=True, slots=True)
class Split:
    """ignore_merges: a piece that is a token is that token, whatever the merges say. add_bos: unless the file says so."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS_AND_SPACES = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# Words by letter case: capitals then small letters. Lm, Lo and M count as both.
_CAPITALS, _SMALLS = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}*{_SMALLS}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}+{_SMALLS}*"
_SIGNS_WITH_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_ENDINGS}|{_WORDS}|\p{{N}}{{1,3}}|{_SIGNS_AND_SPACES}"
QWEN2 = rf"{_ENDINGS}|{_WORDS}|\p{{N}}|{_SIGNS_AND_SPACES}"
QWEN35 = (
    rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_SIGNS_WITH_SLASH}"
GPT4O = rf"{_CASED[0]}{_ENDINGS}?|{_CASED[1]}{_ENDINGS}?|\p{{N}}{{1,3}}|{_SIGNS_WITH_SLASH}"
_DIGIT = r"\p{N}"
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", GPT2, r"[0-9][0-9][0-9]")
_UNSTATED = (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")    # what llama.cpp does without a name

_KINDS: tuple[tuple[Split, str], ...] = (
    (Split(_UNSTATED), "default"),
    (Split((GPT2,)), "gpt-2 phi-2 mpt olmo jais trillion granite-docling gigachat a.x-4.0 mellum modern-bert exaone4"),
    (Split((_DIGIT, GPT2)), "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2"),
    (
        Split((LLAMA3,), ignore_merges=True, add_bos=True),
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
    ),
    (Split((LLAMA3,)), "dbrx smaug-bpe glm4 chatglm-bpe"),
    (Split((QWEN2,)), "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2"),
    (Split((QWEN35,)), "qwen35"),
    (Split((TEKKEN,), ignore_merges=True, add_bos=True), "tekken"),
    (Split((GPT4O,)), "gpt-4o llama4 kanana2 talkie minimax-m2"),
    (Split(_DEEPSEEK3), "deepseek-v3 hunyuan-dense joyai-llm hy_v4"),
    (Split(_FALCON), "falcon"),
)

SPLITS: dict[str, Split] = {name: split for split, names in _KINDS for name in names.split()}
