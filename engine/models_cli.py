"""`rillet pull`, `list`, `show` and `remove`: the models on this disk. No command here loads a weight or starts a backend.

engine.cli calls a command with its arguments and takes its exit code: 0; 1 after a RilletError, in one sentence; 2 for wrong
flags; 130 after Ctrl-C. What is asked for goes to stdout, plain text without colours; remarks and bars go to stderr.
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from engine.config import EngineConfig
from engine.conversation import clean
from engine.errors import ConfigError, ModelNotFound, RilletError
from engine.flags import FLAGS, Flag

__all__ = ["COMMANDS", "HELP"]

HELP = {
    "pull": "download a model from a hub",
    "list": "the models on this disk",
    "show": "what a model is: sizes, types, memory, template",
    "remove": "delete a model from a hub's cache",
}
SHARED = {flag.name: flag for flag in FLAGS}             # the same names, variables and help as everywhere
WHERE = ("model-source", "hf-token", "hf-token-path")    # also read from RILLET_* variables
INTERRUPTED = 130
log = logging.getLogger("rillet")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (--help lists every flag)")


class _NobodyReads(Exception):
    """stdout does not take what is written: its reader has left, or its disk is full."""


def _pull(arguments: Sequence[str]) -> None:
    from engine.weights.hub import model_path

    given = _parse("pull", arguments, "f", "revision", "model-source", "hf-token", "hf-token-path")
    path = model_path(_config(given))
    _say(clean(str(path)))


def _list(arguments: Sequence[str]) -> None:
    from engine.model_card import columns, size_text
    from engine.weights.hub import DEMO_WHEEL, demo_model
    from engine.weights.models import cached_models

    _parse("list", arguments, model="no")
    now = time.time()
    rows = [
        (model.name, model.form, size_text(model.size_bytes), _ago(now - model.used), model.source)
        for model in cached_models()
    ]
    if (demo := demo_model()) is not None:
        state = demo.stat()
        used = _ago(now - max(state.st_atime, state.st_mtime))
        rows.append((f"{demo.stem} (demo)", "GGUF", size_text(state.st_size), used, DEMO_WHEEL))
    if not rows:
        _remark("no models yet: `rillet pull owner/name` brings one")
        return
    lines = columns([("model", "files", "size", "last used", "from"), *rows], right=(2,))
    _say("\n".join(clean(line) for line in lines))


def _show(arguments: Sequence[str]) -> None:
    from engine.model_card import model_card
    from engine.weights.open_model import open_model

    given = _parse("show", arguments, "f", "revision", "model-source", model="maybe")
    checkpoint = open_model(_config(given, offline=True))
    try:
        _say(clean(model_card(checkpoint)))
    finally:
        checkpoint.close()


def _remove(arguments: Sequence[str]) -> None:
    from engine.model_card import size_text
    from engine.weights.hub import DEMO_WHEEL, demo_model, is_path, split_tag
    from engine.weights.models import plan_removal

    yes = Flag("yes", "yes", bool, "do not ask")
    given = _parse("remove", arguments, "model-source", own=(yes,))
    if is_path(given["model_id"]):
        raise ConfigError(f"{given['model_id']} is a path: delete it yourself, remove is for the hubs' caches")
    if (demo := demo_model()) is not None and given["model_id"] in (demo.name, demo.stem):
        raise ConfigError(f"{given['model_id']} is the demo model, an installed package: pip uninstall {DEMO_WHEEL}")
    removal = plan_removal(*split_tag(given["model_id"]), _config(given).model_source)
    count = "1 file" if removal.files == 1 else f"{removal.files} files"
    what = clean(f"{removal.name} ({count}, {size_text(removal.size_bytes)})")
    if not given["yes"]:
        if sys.stdin is None or not sys.stdin.isatty():                      # None: closed
            raise ConfigError(f"{what} is not removed: say --yes where nobody can be asked")
        _remark(f"Remove {what}? [y/N] ", end="")
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            _remark("nothing is removed")
            return
    try:
        removal.execute()
    except OSError as error:
        raise ModelNotFound(f"{removal.name} cannot be removed ({error}): check the rights of the cache") from error
    _say(f"removed {what}")


def _say(text: str) -> None:
    """What was asked for, to stdout; nothing where that is closed. Raises _NobodyReads."""
    try:
        print(text, flush=True)
    except OSError as error:
        raise _NobodyReads from error


def _remark(text: str, end: str = "\n") -> None:
    if sys.stderr is not None:                           # print() takes None for stdout
        print(text, end=end, file=sys.stderr, flush=True)


def _parse(
    command: str, arguments: Sequence[str], *names: str, own: Sequence[Flag] = (), model: str = "yes"
) -> dict[str, Any]:
    """The arguments by field; of WHERE also what RILLET_* variables say. model: yes, maybe or no."""
    flags = [*(SHARED[name] for name in names), *own]
    parser = _Parser(prog=f"rillet {command}", description=f"{HELP[command].capitalize()}.", allow_abbrev=False)
    if model != "no":
        about = "owner/name or owner/name:Q4_K_M" + {"pull": "", "remove": ", as `rillet list` writes it"}.get(
            command, " in a cache, or a path (default: the demo model)"
        )
        parser.add_argument("model_id", metavar="MODEL", nargs="?" if model == "maybe" else None, help=about)
    for flag in flags:
        if flag.kind is bool:
            parser.add_argument(f"--{flag.name}", dest=flag.field, nargs="?", const="1", metavar="0|1", help=flag.help)
        else:
            parser.add_argument(f"--{flag.name}", dest=flag.field, metavar=flag.kind.__name__.upper(), help=flag.help)
    texts = vars(parser.parse_args(list(arguments)))
    for flag in flags:
        text = texts[flag.field]
        if text is None and flag.name in WHERE:
            text = os.environ.get(flag.variable)
        texts[flag.field] = None if text is None else flag.read(text)
    return texts


def _config(given: dict[str, Any], *, offline: bool = False) -> EngineConfig:
    named = {flag.field for flag in FLAGS} & given.keys()
    return EngineConfig(**{name: given[name] for name in named if given[name] is not None}, offline=offline)


def _ago(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size:,.0f} {unit} ago"
    return "just now"


def _command(name: str, body: Callable[[Sequence[str]], None]) -> Callable[[Sequence[str]], int]:
    def run(arguments: Sequence[str]) -> int:
        logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
        logging.getLogger("huggingface_hub").propagate = False               # it prints its own warnings
        try:
            body(arguments)
        except _NobodyReads:                             # what is buffered must not fail again at the exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except KeyboardInterrupt:
            return INTERRUPTED
        except RilletError as error:
            _remark(f"rillet {name}: {clean(str(error))}")
            return 2 if isinstance(error, ConfigError) else 1
        return 0

    return run


COMMANDS = {
    name: _command(name, body)
    for name, body in (("pull", _pull), ("list", _list), ("show", _show), ("remove", _remove))
}
