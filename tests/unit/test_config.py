"""Flags and variables: one table, read the same way from a command line and from the environment."""

import pytest

from engine.config import FLAGS, EngineConfig, Flag, parse_environment, parse_flags
from engine.errors import ConfigError

VALUES: dict[type, tuple[str, object]] = {
    str: ("text", "text"), int: ("7", 7), float: ("0.5", 0.5), bool: ("1", True), tuple: ("0,1", (0, 1)),
}  # fmt: skip
SPECIAL: dict[str, tuple[str, object]] = {"dtype": ("f32", "f32")}
PARSED = [flag for flag in FLAGS if flag.name != "isq"]


def parse(*arguments: str, own: tuple[Flag, ...] = ()) -> EngineConfig:
    return parse_flags(arguments, own, program="test", description="")[0]


def sample(flag: Flag) -> tuple[str, object]:
    return SPECIAL.get(flag.name) or VALUES[flag.kind]


@pytest.mark.parametrize("flag", PARSED, ids=lambda flag: flag.name)
@pytest.mark.parametrize("dash", ["-", "_"])
def test_every_flag_fills_its_field(flag: Flag, dash: str) -> None:
    text, value = sample(flag)
    name = flag.name.replace("-", dash)
    assert getattr(parse(f"--{name}={text}"), flag.field) == value
    assert getattr(parse(f"--{name}", text), flag.field) == value


@pytest.mark.parametrize("flag", PARSED, ids=lambda flag: flag.name)
def test_every_flag_is_a_variable(flag: Flag) -> None:
    text, value = sample(flag)
    config, _ = parse_environment({flag.variable: text, "PATH": "/bin"})
    assert getattr(config, flag.field) == value
    assert flag.variable == "RILLET_" + flag.name.upper().replace("-", "_")


@pytest.mark.parametrize(("text", "value"), [("1", True), ("TRUE", True), ("yes", True), ("0", False), ("off", False)])
def test_a_switch_takes_words(text: str, value: bool) -> None:
    assert parse("--prefix-cache", text).prefix_cache is value


def test_a_switch_alone_is_on() -> None:
    assert parse("--fp8-kvcache", "--seed", "3").fp8_kvcache is True


@pytest.mark.parametrize(
    "line",
    [
        "--m Qwen/Qwen3-0.6B --f model.gguf --max-model-len 4096",
        "--d 0,1 --w /home/Qwen3 --max-num-seqs 2 --max_model_len 8192",
        "--f /home/model.gguf --temperature 0.7 --top-k 64 --top-p 0.9 --presence-penalty 1.2 --frequency-penalty 1.2",
        "--m unsloth/model --f model-Q4_K_M.gguf --context-cache --fp8-kvcache --dtype bf16 --max-tokens 100",
    ],
)
def test_command_lines_in_the_style_of_vllm_rs_parse(line: str) -> None:
    assert parse(*line.split()).model_id or line.count("--w") or line.count("--f")


def test_own_flags_come_apart_from_the_config() -> None:
    own = (Flag("system", "system", str, ""), Flag("port", "port", int, ""))
    config, values = parse_flags(["--system", "be brief", "--seed", "1"], own, program="test", description="")
    assert (config.seed, values) == (1, {"system": "be brief", "port": None})
    config, values = parse_environment({"RILLET_PORT": "80"}, own)
    assert values == {"system": None, "port": 80}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--threads", "many"], ["--threads", "whole number", "'many'"]),
        (["--top-p", "high"], ["--top-p", "a number", "'high'"]),
        (["--d", "0,x"], ["--d", "numbers with commas", "'0,x'"]),
        (["--prefix-cache", "maybe"], ["--prefix-cache", "1 or 0", "'maybe'"]),
        (["--dtype", "int3"], ["dtype", "'int3'", "bf16"]),
        (["--temperature", "-1"], ["temperature", "-1", "0 to 100"]),
        (["--temperature", "nan"], ["temperature", "nan"]),
        (["--max-model-len", "1"], ["max_model_len", "1"]),
        (["--d", "-1"], ["device_ids", "-1"]),
        (["--isq", "q4k"], ["--isq q4k", "GGUF"]),
        (["--nonsense"], ["--nonsense", "--help"]),
        (["--max-tok", "3"], ["--max-tok", "--help"]),
        (["stray"], ["stray"]),
        (["--seed"], ["--seed", "expected one argument"]),
    ],
)
def test_a_wrong_value_is_named_with_its_flag(arguments: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(*arguments)
    for word in words:
        assert word in str(caught.value)


def test_an_unknown_variable_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="RILLET_MAX_NUM_SEQ is no setting of Rillet: did you mean RILLET_MAX_NUM_SEQS"):
        parse_environment({"RILLET_MAX_NUM_SEQ": "3"})


def test_a_wrong_variable_names_its_value() -> None:
    with pytest.raises(ConfigError, match="'three'"):
        parse_environment({"RILLET_MAX_NUM_SEQS": "three"})


def test_the_hub_token_comes_from_its_usual_variable() -> None:
    assert parse_environment({"HF_TOKEN": "hf_x"})[0].hf_token == "hf_x"
    assert parse_environment({})[0] == EngineConfig()


def test_help_lists_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse("--help")
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"--{flag.name} " in shown for flag in FLAGS)


def test_sampling_flags_are_the_defaults_of_requests() -> None:
    assert parse("--temperature", "0", "--top-k", "5").sampling_defaults == {"temperature": 0.0, "top_k": 5}
