"""Every command line in vllm.rs's README (ReadMe.md and python/ReadMe.md at commit 841ba0d) parses with our programs: a
config comes out with the right values. What no backend can do yet is refused later, when the model loads."""

import re
import shlex
from typing import Any

import pytest

from engine import ConfigError, EngineConfig, chat, completion
from engine.flags import parse_flags
from engine.vllm_rs import with_command
from server.settings import ServerSettings, settings_from_flags

FILE = "Qwen3-30B-A3B-Instruct-2507-Q4_K_M.gguf"
HUB = {"model_id": "unsloth/Qwen3-30B-A3B-Instruct-2507-GGUF", "weight_file": FILE}
LOCAL = {"weight_file": f"/path/{FILE}"}
QWEN_30B = {"weight_path": "/path/Qwen3-30B-A3B-Instruct-2507"}
GLM4 = {"weight_path": "/home/GLM-4-9B-0414", "device_ids": (0, 1), "max_tokens": 1024, "max_model_len": 1024}
EVERYWHERE = {"host": "0.0.0.0", "port": 8000}
SESSIONS = {"context_cache": True, "flash_context": True}
HOW = "How are you today?"

# (the line as it stands there, our program, the config's fields beside the defaults, the program's own flags)
LINES: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    (
        f"python -m vllm_rs.server --f /path/{FILE} --host 0.0.0.0 --port 8000 --max-tokens 32768 --max-model-len 128000 "
        "--fp8-kvcache",
        "serve", {**LOCAL, "max_tokens": 32768, "max_model_len": 128000, "fp8_kvcache": True}, EVERYWHERE,
    ),
    (
        f"python -m vllm_rs.server --m {HUB['model_id']} --f {FILE} --host 0.0.0.0 --port 8000",
        "serve", HUB, EVERYWHERE,
    ),
    (
        f"python -m vllm_rs.server --f /path/{FILE} --d 0,1 --host 0.0.0.0 --port 8000 --max-model-len 64000",
        "serve", {**LOCAL, "device_ids": (0, 1), "max_model_len": 64000}, EVERYWHERE,
    ),
    (
        "python -m vllm_rs.server --w /path/Qwen3-30B-A3B-Instruct-2507 --d 0,1 --host 0.0.0.0 --port 8000 --isq q4k "
        "--max-model-len 262144 --max-num-seqs 1",
        "serve", {**QWEN_30B, "device_ids": (0, 1), "isq": "Q4_K", "max_model_len": 262144, "max_num_seqs": 1}, EVERYWHERE,
    ),
    (
        f"python -m vllm_rs.server --m {HUB['model_id']} --f {FILE} --d 0,1 --host 0.0.0.0 --port 8000 --max-model-len 64000 "
        "--max-num-seqs 8 --context-cache",
        "serve", {**HUB, **SESSIONS, "device_ids": (0, 1), "max_model_len": 64000, "max_num_seqs": 8}, EVERYWHERE,
    ),
    (f"python -m vllm_rs.chat --m {HUB['model_id']} --f {FILE} --fp8-kvcache", "chat", {**HUB, "fp8_kvcache": True}, {}),
    (f"python -m vllm_rs.chat --d 1 --f /path/{FILE}", "chat", {**LOCAL, "device_ids": (1,)}, {}),
    (
        "python -m vllm_rs.chat --d 0 --w /path/Qwen3-30B-A3B-Instruct-2507 --isq q4k --max-model-len 262144 "
        "--max-num-seqs 1 --max-tokens 16384",
        "chat", {**QWEN_30B, "isq": "Q4_K", "max_model_len": 262144, "max_num_seqs": 1, "max_tokens": 16384}, {},
    ),
    (
        f"python -m vllm_rs.chat --d 0,1 --m {HUB['model_id']} --f {FILE} --max-model-len 262144 --max-num-seqs 1 "
        "--context-cache",
        "chat", {**HUB, **SESSIONS, "device_ids": (0, 1), "max_model_len": 262144, "max_num_seqs": 1}, {},
    ),
    ("python -m vllm_rs.chat --w /path/Qwen3-0.6B --isq q4k", "chat", {"weight_path": "/path/Qwen3-0.6B", "isq": "Q4_K"}, {}),
    (
        'python -m vllm_rs.completion --f /path/qwq-32b-q4_k_m.gguf --prompts "How are you? | How to make money?"',
        "complete", {"weight_file": "/path/qwq-32b-q4_k_m.gguf"}, {"prompts": "How are you? | How to make money?"},
    ),
    (
        "python -m vllm_rs.completion --w /home/GLM-4-9B-0414 --d 0,1 --batch 8 --max-model-len 1024 --max-tokens 1024",
        "complete", GLM4, {"batch": 8},
    ),
    (
        "python -m vllm_rs.completion --w /home/Qwen3-0.6B/ --batch 256 --max-tokens 1024 --max-model-len 1024",
        "complete", {"weight_path": "/home/Qwen3-0.6B/", "max_tokens": 1024, "max_model_len": 1024}, {"batch": 256},
    ),
    (
        f"cargo run --release --features cuda,nccl -- --i --d 0 --m {HUB['model_id']} --f {FILE} --max-model-len 262144 "
        "--context-cache",
        "chat", {**HUB, **SESSIONS, "max_model_len": 262144}, {},
    ),
    (
        "./run.sh --release --features cuda,nccl,flash-attn -- --i --d 0,1 --w /path/Qwen3-30B-A3B-Instruct-2507 --isq q4k "
        "--max-model-len 262144 --context-cache",
        "chat", {**QWEN_30B, **SESSIONS, "device_ids": (0, 1), "isq": "Q4_K", "max_model_len": 262144}, {},
    ),
    (
        "./run.sh --release --features cuda,nccl,flash-attn -- --d 0,1 --w /path/Qwen3-30B-A3B-Instruct-2507 --isq q4k "
        "--max-model-len 100000 --max-num-seqs 4 --server --port 8000 --fp8-kvcache",
        "serve",
        {**QWEN_30B, "device_ids": (0, 1), "isq": "Q4_K", "max_model_len": 100000, "max_num_seqs": 4, "fp8_kvcache": True},
        {"port": 8000},
    ),
    (
        "./run.sh --release --features cuda,nccl,flash-context -- --d 0,1 --w /path/Qwen3-30B-A3B-Instruct-2507 --isq q4k "
        "--max-model-len 100000 --max-num-seqs 4 --server --port 8000 --context-cache",
        "serve",
        {**QWEN_30B, **SESSIONS, "device_ids": (0, 1), "isq": "Q4_K", "max_model_len": 100000, "max_num_seqs": 4},
        {"port": 8000},
    ),
    (
        "cargo run --release --features cuda,graph -- --i --f /path/qwq-32b-q4_k_m.gguf --presence-penalty 1.2 "
        "--frequency-penalty 1.2",
        "chat",
        {"weight_file": "/path/qwq-32b-q4_k_m.gguf", "presence_penalty": 1.2, "frequency_penalty": 1.2}, {},
    ),
    (
        "cargo run --release --features metal -- --i --f /path/DeepSeek-R1-Distill-Llama-8B-Q2_K.gguf",
        "chat", {"weight_file": "/path/DeepSeek-R1-Distill-Llama-8B-Q2_K.gguf"}, {},
    ),
    (
        "cargo run --release --features metal -- --i --w /path/Qwen3-0.6B --isq q4k --context-cache",
        "chat", {**SESSIONS, "weight_path": "/path/Qwen3-0.6B", "isq": "Q4_K"}, {},
    ),
    (
        f'cargo run --release --features cuda,flash-attn -- --w /path/Qwen3-8B/ --prompts "{HOW}"',
        "complete", {"weight_path": "/path/Qwen3-8B/"}, {"prompts": HOW},
    ),
    (
        f'cargo run --release --features metal -- --w /path/Qwen3-8B/ --prompts "{HOW}"',
        "complete", {"weight_path": "/path/Qwen3-8B/"}, {"prompts": HOW},
    ),
    (
        "./run.sh --release --features cuda,nccl -- --w /home/GLM-4-9B-0414 --d 0,1 --i --max-tokens 1024 "
        "--max-model-len 1024",
        "chat", GLM4, {},
    ),
    (
        "./run.sh --release --features cuda,nccl -- --w /home/GLM-4-9B-0414 --d 0,1 --max-tokens 1024 --max-model-len 1024 "
        "--server",
        "serve", GLM4, {},
    ),
    (
        "./run.sh --release --features cuda,nccl,flash-attn -- --w /home/GLM-4-9B-0414 --d 0,1 --i --max-tokens 1024 "
        "--max-model-len 1024 --context-cache",
        "chat", {**GLM4, **SESSIONS}, {},
    ),
    (
        f'cargo run --release --features metal -- --w /path/Qwen3-0.6B/ --isq q4k --prompts "{HOW}"',
        "complete", {"weight_path": "/path/Qwen3-0.6B/", "isq": "Q4_K"}, {"prompts": HOW},
    ),
    (
        f'cargo run --release --features cuda,flash-attn -- --w /path/Qwen3-8B/ --isq q4k --prompts "{HOW}"',
        "complete", {"weight_path": "/path/Qwen3-8B/", "isq": "Q4_K"}, {"prompts": HOW},
    ),
]  # fmt: skip
PROGRAMS = {"server": "serve", "chat": "chat", "completion": "complete"}


def ours(line: str) -> tuple[str, list[str]]:
    """A line of theirs -> (our command, its arguments), as a user or the command line itself translates it."""
    words = shlex.split(line)
    if words[:2] == ["python", "-m"]:
        return PROGRAMS[words[2].removeprefix("vllm_rs.")], words[3:]
    command, *arguments = with_command(words[words.index("--") + 1 :])
    return command, arguments


def parsed(command: str, arguments: list[str]) -> tuple[EngineConfig, dict[str, Any]]:
    """What comes out: the config, and the program's own flags that were given."""
    if command == "serve":
        config, settings = settings_from_flags(arguments, {}, "test")
        default = ServerSettings()
        given = {name: getattr(settings, name) for name in ("host", "port")}
        assert settings == ServerSettings(**given)
        return config, {name: value for name, value in given.items() if value != getattr(default, name)}
    config, own = parse_flags(arguments, {"chat": chat, "complete": completion}[command].OWN, program="test", description="")
    return config, {name: value for name, value in own.items() if value is not None}


@pytest.mark.parametrize(("line", "program", "config", "own"), LINES, ids=range(len(LINES)))
def test_a_command_line_of_vllm_rs_gives_its_values(
    line: str, program: str, config: dict[str, Any], own: dict[str, Any]
) -> None:
    command, arguments = ours(line)
    assert command == program
    found, found_own = parsed(command, arguments)
    assert found == EngineConfig(**config)
    for name, value in config.items():                   # one by one, not only as the constructor makes them
        assert getattr(found, name) == value
    assert found_own == {name: value for name, value in own.items() if (name, value) != ("port", 8000)}


def test_a_flag_of_the_table_that_no_line_shows() -> None:
    """The README's table of flags has these besides those of the lines above."""
    shown = {word for line, *_ in LINES for word in re.findall(r"--[a-z0-9-]+", line.partition(" -- ")[2] or line)}
    table = {
        "--m", "--w", "--f", "--d", "--max-num-seqs", "--max-tokens", "--batch", "--prompts", "--dtype", "--isq",
        "--temperature", "--top-k", "--top-p", "--presence-penalty", "--frequency-penalty", "--server", "--fp8-kvcache",
    }  # fmt: skip
    assert table - shown == {"--dtype", "--temperature", "--top-k", "--top-p"}
    line = "--dtype f16 --temperature 0.7 --top-k 64 --top-p 0.9"
    for command in PROGRAMS.values():
        config, _ = parsed(command, line.split())
        assert (config.dtype, config.temperature, config.top_k, config.top_p) == ("f16", 0.7, 64, 0.9)


def test_log_is_a_flag_of_chat_and_completion() -> None:
    for command in ("chat", "complete"):
        assert parsed(command, ["--log"])[1] == {"log": True}
    assert parsed("chat", ["--i"])[1] == {"interactive": True}


def test_a_wrong_isq_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="isq must be one of"):
        parsed("complete", ["--isq", "q1k"])
