"""Makes tokens.json: hard texts tokenized by transformers' GGUF converter and by llama.cpp, for every split pattern.

Two vocabularies: the demo model's, and a "glue" one trained here on the same texts without any splitting, so that it would
merge across every boundary if a split pattern did not forbid it. Run with a Python that has transformers, torch and gguf,
and name one that has llama-cpp-python:

    python tests/golden/make_tokens.py --peer /tmp/peer/bin/python --gguf .../SmolLM2-135M-Instruct.Q4_1.gguf
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
PRES = (
    "default", "gpt-2", "smollm", "llama-bpe", "glm4", "qwen2", "qwen35", "tekken", "gpt-4o", "deepseek-v3", "falcon",
    "deepseek-llm", "deepseek-coder", "seed-coder",
)
TEXTS = (
    "Hello, world! How are you?",
    "  leading and trailing  ",
    "a  b   c    d     e\t\tf\t g",
    "line\nline\n\nline\r\nline\r\n\r\n  indented\n\t\ttabs\n   \n",
    "def f(x: int) -> list[int]:\n    return [x ** 2 for _ in range(10)]  # ok\n",
    "1 12 123 1234 12345 1234567890 3.14159 1,000,000 0x1F ½ ² Ⅳ ٣٤٥ १२३",
    "I'm you're he's we'll they'd I've can't I'M YOU'RE 'tis ' s 's",
    "naïve café résumé Ångström Straße İstanbul ﬁ ﬂ",
    "e\u0301 a\u0308 n\u0303 Z\u0335\u0321a\u0310lgo \u0e01\u0e33 ก็ ที่",
    "👩‍👩‍👧‍👦 👍🏽 🇩🇪🇫🇷 ☃️ 😀😃😄 🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "中文字符测试,日本語のテスト。한국어 테스트",
    "مرحبا بالعالم، كيف حالك؟ שלום עולם",
    "नमस्ते दुनिया বাংলা தமிழ்",
    "Привет, мир! Ελληνικά ქართული",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|><|endoftext|> text <|im_end|><|not_special|> <|im_start |>",
    "nul\x00in\x00side \x01\x02\x7f\x80\x9f \xa0nbsp\u2028ls\u2029ps\u200bzw\ufeffbom",
    "https://example.com/a/b?c=d&e=f#g user@example.org C:\\path\\to\\file",
    "!!! ??? ... --- *** ((())) {{{}}} [[[]]] <<<>>> $$$ %%% @@@ ### ~~~ ``` ||| \\\\\\",
    "x=1;y=2;z=x+y;print(z)//comment/*block*/",
    "SELECT * FROM t WHERE a='b' AND c<>\"d\";",
    "CamelCase snake_case SCREAMING_CASE kebab-case PascalCaseWithHTMLAndXML iPhone eBay",
    "ǅ ǈ ʰ ˠ ª º ᴬ DŽungla ǄUNGLA",
    "word\u3000ideographic\u2003em\u2009thin\u00a0nbsp  \u2003 mix",
    "'''\"\"\"‘’“”«»",
    "a" * 400,
    "antidisestablishmentarianism" * 12,
    " " * 67 + "x" + " " * 5,
    "\n" * 9 + "\r\n" * 4 + " \n \n",
    "1" * 50 + "a" + "2" * 31,
    "\U0001f600" * 20 + "\u0301" * 8,
    "",
    " ",
    "\n",
    "\ud55c\uae00 \uae00\uc790",
    "+-×÷=≠≤≥∞∑∏√∫ ∂∇ αβγ ℝℂℕ ⊂⊃∪∩",
    "{\"json\": [1, 2.5, null, true], \"k\": \"v\\n\"}",
    "Don't stop\u2019til you\u2019ve had enough; it\u2019s O'Reilly's.",
    "\t\ttab\t \t mixed \t\n\t\n",
    "¿Qué? ¡Sí! €100 £50 ¥1000 ₹5 №7 §3 ©2024 ™ ®",
)


def glue_vocabulary() -> tuple[list[str], list[str]]:
    """Tokens and merges of a BPE that was trained on whole texts; <|endoftext|> is id 0."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=3000,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = [word for text in TEXTS for word in (text, *text.split(" "), *text.split("\n"), *text.split())]
    tokenizer.train_from_iterator(words, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return tokens, [" ".join(merge) for merge in model["merges"]]


def write_vocabulary(target: Path, pre: str, tokens: list[str], merges: list[str]) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(target, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_feed_forward_length(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def by_transformers(path: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]


def by_llama_cpp(path: Path) -> list[list[int]]:
    from llama_cpp import Llama

    model = Llama(str(path), vocab_only=True, verbose=False)
    return [model.tokenize(text.encode(), add_bos=False, special=True) for text in TEXTS]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--peer", help="a Python that has llama-cpp-python")
    parser.add_argument("--llama-cpp", type=Path, help="(the peer's half) print the tokens of this file")
    options = parser.parse_args()
    if options.llama_cpp:
        print(json.dumps(by_llama_cpp(options.llama_cpp)))
        return
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as KNOWN

    def both(path: Path, pre: str) -> dict[str, list[list[int]]]:
        result = {}
        if pre in KNOWN or pre == "gpt-2":           # for other names transformers silently takes GPT-2's pattern
            result["transformers"] = by_transformers(path)
        peer = subprocess.run([options.peer, __file__, "--llama-cpp", path], capture_output=True, text=True)
        if peer.returncode:
            print(pre, "is not known to this llama.cpp:", peer.stderr[-300:], file=sys.stderr)
        else:
            result["llama.cpp"] = json.loads(peer.stdout.splitlines()[-1])
        return result

    tokens, merges = glue_vocabulary()
    result: dict = {"texts": TEXTS, "tokens": tokens, "merges": merges, "demo": both(options.gguf, "smollm"), "glue": {}}
    with tempfile.TemporaryDirectory() as folder:
        for pre in PRES:
            path = Path(folder) / "model.gguf"
            write_vocabulary(path, pre, tokens, merges)
            result["glue"][pre] = both(path, pre)
    lines = [f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in result.items()]
    (HERE / "tokens.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
