"""ServerSettings: what the server alone needs to know, beside the engine's config; and the table of its own flags.

Both ways in use it: `python -m server` (flags over RILLET_* variables) and `hypercorn server.app:app` (variables only). The
supervisor hands both to its workers as variables. It opens nothing and starts nothing.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from engine import FLAGS as ENGINE_FLAGS
from engine import ConfigError, EngineConfig, Flag, parse_environment, parse_flags

__all__ = ["FLAGS", "ServerSettings", "configure_logging", "settings_from_environment", "settings_from_flags", "variables_of"]

MIB = 1 << 20
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[A-Za-z0-9.\-\[\]:]+|null")       # scheme://host[:port], as browsers write it
LOG_LEVELS = ("debug", "info", "warning", "error")
DESCRIPTION = (
    "Serve the OpenAI API. Every flag is a variable too: --max-num-seqs is RILLET_MAX_NUM_SEQS; a flag wins over it."
)


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Raises ConfigError with the value and the cure."""

    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1                          # processes that answer; more than one share an engine process
    api_keys: tuple[str, ...] = ()            # none: everybody may ask
    drain_s: float = 30.0                     # how long running answers may go on after SIGTERM
    stall_s: float = 30.0                     # a client that takes nothing for so long is cut off
    heartbeat_s: float = 10.0                 # an empty line is sent when nothing else was for so long
    body_s: float = 60.0                      # how long a request's body may take to arrive
    body_bytes: int = 16 * MIB
    bodies_bytes: int = 256 * MIB             # what all bodies that are being read may hold at once; the others wait
    cors_origins: tuple[str, ...] = ()        # whose pages may use this server; "*" is everybody's
    log_level: str = "info"

    def __post_init__(self) -> None:
        for name, low, high in BOUNDS:
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"{name} must be from {low:g} to {high:g}, not {value!r}")
        if self.log_level not in LOG_LEVELS:
            raise ConfigError(f"log_level must be one of {', '.join(LOG_LEVELS)}, not {self.log_level!r}")
        if any(not key or not key.isascii() or not key.isprintable() or " " in key for key in self.api_keys):
            raise ConfigError("an API key is empty or has blanks or characters beyond ASCII: no client could send it")
        for origin in self.cors_origins:
            if origin != "*" and not ORIGIN.fullmatch(origin):
                raise ConfigError(f"cors_origins must be origins such as https://chat.example:8443, or *, not {origin!r}")


BOUNDS: tuple[tuple[str, float, float], ...] = (
    ("port", 0, 65535),
    ("workers", 1, 256),
    ("drain_s", 0, 3600),
    ("stall_s", 0.05, 3600),
    ("heartbeat_s", 0.05, 3600),
    ("body_s", 0.05, 3600),
    ("body_bytes", 1024, 1 << 30),
    ("bodies_bytes", 1024, 1 << 40),
)

FLAGS: tuple[Flag, ...] = (
    Flag("host", "host", str, "address to listen on (default: 127.0.0.1; 0.0.0.0 is every one)"),
    Flag("port", "port", int, "port to listen on (default: 8000; 0 takes a free one)"),
    Flag("workers", "workers", int, "processes that answer, over one engine process (default: 1, with the engine in it)"),
    Flag("api-key", "api_keys", str, "key, or keys with commas, that requests must show; better given as RILLET_API_KEY"),
    Flag("drain-deadline", "drain_s", float, "seconds that running answers may go on after SIGTERM (default: 30)"),
    Flag("stall-timeout", "stall_s", float, "seconds after which a client that reads nothing is cut off (default: 30)"),
    Flag("heartbeat", "heartbeat_s", float, "seconds between empty lines on a silent stream (default: 10)"),
    Flag("body-timeout", "body_s", float, "seconds that a request's body may take to arrive (default: 60)"),
    Flag("body-limit", "body_bytes", int, "bytes that a request's body may have (default: 16 MiB)"),
    Flag("bodies-limit", "bodies_bytes", int, "bytes that all bodies being read may hold at once (default: 256 MiB)"),
    Flag("cors-origins", "cors_origins", str, "origins with commas whose pages may ask, or * (default: only our own page)"),
    Flag("log-level", "log_level", str, "debug, info, warning or error (default: info)"),
)
BY_FIELD: Mapping[str, Flag] = {flag.field: flag for flag in FLAGS}


def settings_from_flags(
    arguments: Sequence[str], environ: Mapping[str, str], program: str
) -> tuple[EngineConfig, ServerSettings]:
    """The command line over the RILLET_* variables: each variable becomes its flag, the command line's come after."""
    parse_environment(environ, FLAGS)                     # its errors name the variable
    written = [f"--{name[7:].lower().replace('_', '-')}={text}" for name, text in environ.items() if name[:7] == "RILLET_"]
    config, values = parse_flags([*written, *arguments], FLAGS, program=program, description=DESCRIPTION)
    return config, _settings(values)


def settings_from_environment(environ: Mapping[str, str]) -> tuple[EngineConfig, ServerSettings]:
    """The RILLET_* variables alone."""
    config, values = parse_environment(environ, FLAGS)
    return config, _settings(values)


def variables_of(config: EngineConfig, settings: ServerSettings) -> dict[str, str]:
    """The RILLET_* variables that settings_from_environment makes the same two of."""
    variables = {}
    for part, flags in ((config, ENGINE_FLAGS), (settings, FLAGS)):
        defaults = {field.name: field.default for field in fields(part)}
        for flag in flags:
            if (value := getattr(part, flag.field)) != defaults[flag.field]:
                variables[flag.variable] = _text(value)
    return variables


def _text(value: Any) -> str:
    match value:
        case bool():
            return str(int(value))
        case tuple():
            return ",".join(map(str, value))
    return str(value)


def _settings(values: dict[str, Any]) -> ServerSettings:
    given = {name: value for name, value in values.items() if value is not None}
    for name in ("api_keys", "cors_origins"):
        if name in given:
            given[name] = tuple(one.strip() for one in given[name].split(","))
    assert given.keys() <= {field.name for field in fields(ServerSettings)}
    try:
        return ServerSettings(**given)
    except ConfigError as error:                          # tell the flag, not the field
        name, _, rest = str(error).partition(" must be ")
        if rest and name in BY_FIELD:
            raise ConfigError(f"--{BY_FIELD[name].name} must be {rest}") from None
        raise


def configure_logging(level: str) -> None:
    """Lines of our own loggers go to stderr, once, whoever set up the others."""
    logger = logging.getLogger("rillet")
    logger.setLevel(level.upper())
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
