"""Command lines of vllm.rs's one program, which has no commands but flags that choose: what they are called here.

engine.cli asks when a command line begins with a flag. It opens nothing and parses nothing else.
"""

from collections.abc import Sequence

__all__ = ["with_command"]


def with_command(arguments: Sequence[str]) -> list[str]:
    """`--server ...` is serve, `--i ...` is chat, anything else complete; the flag that chose is left out."""
    for flag, command in (("--server", "serve"), ("--i", "chat")):
        if flag in arguments:
            return [command, *(argument for argument in arguments if argument != flag)]
    return ["complete", *arguments]
