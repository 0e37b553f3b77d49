"""Command lines of vllm.rs's one program, which has no commands but flags that choose: what they are called here.

engine.cli asks when a command line begins with a flag. It opens nothing and parses nothing else.
"""

import sys
from collections.abc import Sequence

__all__ = ["with_command"]


def with_command(arguments: Sequence[str]) -> list[str]:
    """`--server ...` is serve, `--i ...` is chat, anything else complete; the flag that chose is left out.

    Without any of them, and without a prompt, somebody who sits at a terminal wants to chat.
    """
    for flag, command in (("--server", "serve"), ("--i", "chat")):
        if flag in arguments:
            return [command, *(argument for argument in arguments if argument != flag)]
    prompts = any(argument.partition("=")[0] in ("--prompts", "--batch") for argument in arguments)
    at_terminal = sys.stdin is not None and sys.stdin.isatty()
    return ["chat" if at_terminal and not prompts else "complete", *arguments]
