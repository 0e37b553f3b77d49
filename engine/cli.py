"""The console script `rillet`: chat and the models' commands are engine's own, others are entry points `rillet.commands`.

So the engine starts the server without importing it. A command is a function of its arguments that returns an exit code.
"""

import difflib
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import cast

from engine import __version__, models_cli
from engine.vllm_rs import with_command

__all__ = ["main"]

GROUP = "rillet.commands"
Command = Callable[[Sequence[str]], int | None]
HELP = {
    "chat": "chat with a model in the terminal or through a pipe",
    "complete": "answer some prompts as one batch, or measure with --batch",
    "bench": "measure this machine and this build, beside llama.cpp if it is installed",
    "serve": "serve a model to OpenAI clients over HTTP",
    **models_cli.HELP,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `rillet COMMAND ...` and return its exit code; 2 for an unknown command."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    match name:
        case "--version":
            print(f"rillet {__version__}")
            return 0
        case "--help" | "-h" | "help":
            print(_help())
            return 0
        case "chat":
            from engine import chat

            return chat.main(rest)
        case "complete":
            from engine import completion

            return completion.main(rest)
        case "bench":
            from engine.bench import __main__ as bench

            return bench.main(rest)
        case name if name.startswith("--"):              # vllm.rs's own program
            return main(with_command([name, *rest]))
        case name if name in models_cli.COMMANDS:
            return models_cli.COMMANDS[name](rest)
    try:
        command = _command(name)
    except ImportError as error:
        print(f"rillet {name}: it cannot be loaded ({error}): pip install --force-reinstall rillet", file=sys.stderr)
        return 1
    if command is None:
        close = difflib.get_close_matches(name, _names(), 1)
        cure = f"did you mean {close[0]}?" if close else f"there are {', '.join(_names())}"
        print(f"rillet: {name[:40]!r} is no command: {cure}", file=sys.stderr)
        return 2
    return command(rest) or 0


def _names() -> list[str]:
    return ["chat", *sorted(entry_points(group=GROUP).names), "complete", *models_cli.HELP, "bench"]


def _command(name: str) -> Command | None:
    points = entry_points(group=GROUP, name=name)
    return cast(Command, next(iter(points)).load()) if points else None


def _help() -> str:
    lines = [f"  rillet {name:<8} {HELP.get(name, '')}".rstrip() for name in _names()]
    options = ["  rillet --version", "  rillet COMMAND --help   lists the command's flags"]
    return "\n".join(["An async streaming LLM engine without PyTorch.", "", *lines, *options])


if __name__ == "__main__":
    sys.exit(main())
