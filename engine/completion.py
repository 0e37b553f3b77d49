"""python -m engine.completion: answer some prompts as one batch and tell how fast that was.

`--prompts "A | B"` or a text on stdin: stdout gets the answers, in order. `--batch N`: a benchmark with N copies of one
prompt; stdout gets its two figures. Everything else goes to stderr. engine.console says how it starts and ends.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from time import monotonic

import anyio

from engine.api import Engine
from engine.batch import Answer, answer_all
from engine.chat import chat_sampling
from engine.config import EngineConfig
from engine.console import LOG_FLAGS, exit_code, log_to_stderr, opened, speak_utf8
from engine.conversation import clean
from engine.errors import ConfigError
from engine.flags import Flag, parse_flags
from engine.prompts import Prompt
from engine.sampling import SamplingParams
from engine.stream import Delta
from engine.text.messages import Message

__all__ = ["OWN", "main", "performance"]

BATCH_PROMPT = "Please explain in detail how a bicycle works."
HEADING_CHARACTERS = 100
TICK_S = 1.0
OWN = (
    Flag("prompts", "prompts", str, 'prompts with | between them, such as "How are you? | How do planes fly?"'),
    Flag("batch", "batch", int, "benchmark: so many copies of one fixed prompt at once; replaces --max-num-seqs, --prompts"),
    *LOG_FLAGS,
)
DESCRIPTION = (
    "Answer prompts as one batch. Without --prompts and --batch, what stands on stdin is the prompt. The time of the prompts "
    "runs from the first request to the last one's first token; the time of decoding from the first of these to the end, and "
    "first tokens do not count in it. Tokens that the prefix cache knew count as prompt tokens, but in no rate."
)


def main(arguments: Sequence[str] | None = None, program: str = "rillet complete") -> int:
    """Answer and return the exit code: 0, or 1 after a RilletError, 2 for a wrong flag, 130 after Ctrl-C."""
    return exit_code(program, lambda: _main(sys.argv[1:] if arguments is None else arguments, program))


def _main(arguments: Sequence[str], program: str) -> None:
    config, own = parse_flags(arguments, OWN, program=program, description=DESCRIPTION)
    log_to_stderr(own)
    speak_utf8()
    batch = own["batch"]
    if batch is None:
        anyio.run(_complete, config, _prompts(own["prompts"]), backend="asyncio")
        return
    if batch < 1:
        raise ConfigError(f"--batch must be at least 1, not {batch}")
    if own["prompts"] is not None:
        print("--prompts is not used: --batch has a prompt of its own", file=sys.stderr)
    anyio.run(_measure, replace(config, max_num_seqs=batch), batch, backend="asyncio")


def _prompts(flag: str | None) -> list[str]:
    if flag is None:
        prompts = [] if sys.stdin is None or sys.stdin.isatty() else [sys.stdin.read().strip()]
    else:
        prompts = [part.strip() for part in flag.split("|")]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise ConfigError('there is no prompt: give --prompts "A | B", pipe a text in, or measure with --batch 8')
    return prompts


async def _complete(config: EngineConfig, prompts: list[str]) -> None:
    async with opened(config) as engine:
        out = _Live() if len(prompts) == 1 else _InOrder(prompts)
        sampling, ticking = chat_sampling(engine), sys.stderr.isatty() and len(prompts) > 1
        answers = await _answer(engine, prompts, [sampling] * len(prompts), out, ticking)
    for number, answer in enumerate(answers, start=1):
        if answer.finish_reason == "length":
            print(f"(answer {number} was cut after {answer.tokens:,} tokens)", file=sys.stderr)
    print(performance(answers), file=sys.stderr)


async def _measure(config: EngineConfig, batch: int) -> None:
    async with opened(config) as engine:
        print(f"{batch} times {BATCH_PROMPT!r} on {engine.device} ...", file=sys.stderr)
        sampling = chat_sampling(engine)                 # and no copy finds another one's pages in the prefix cache
        each = [replace(sampling, cache_salt=f"copy {number}") for number in range(batch)]
        answers = await _answer(engine, [BATCH_PROMPT] * batch, each, _Silent(), True)
    print(performance(answers))


async def _answer(
    engine: Engine, texts: list[str], sampling: list[SamplingParams], out: "_Silent", ticking: bool
) -> list[Answer]:  # fmt: skip
    asked = list(zip([_prompt(engine, text) for text in texts], sampling, strict=True))
    answers: list[Answer] = []
    failure: Exception | None = None
    async with anyio.create_task_group() as group:
        if ticking:
            group.start_soon(out.tick, len(texts))
        try:
            answers = await answer_all(engine, asked, out.show)
        except Exception as error:                       # raised outside of the group, which would wrap it
            failure = error
        finally:
            group.cancel_scope.cancel()
            out.clear()
    if failure is not None:
        raise failure
    return answers


def _prompt(engine: Engine, text: str) -> Prompt:
    """One turn of a user where the model has a chat template, else the text as it is."""
    return [Message("user", text)] if engine.has_chat_template else text


def performance(answers: Sequence[Answer]) -> str:
    """Two lines: the prompts' and the answers' tokens, the time of each phase (DESCRIPTION says which) and tokens/s."""
    prompt, cached = sum(answer.prompt_tokens for answer in answers), sum(answer.cached_tokens for answer in answers)
    decoded = sum(answer.tokens - answer.first_tokens for answer in answers)
    began, first = min(answer.began_s for answer in answers), min(answer.first_s for answer in answers)
    prompts_s = max(answer.first_s for answer in answers) - began
    decode_s = max(answer.last_s for answer in answers) - first
    known = f" ({cached} of them cached)" if cached else ""
    return (
        f"Prompt tokens: {prompt}{known} in {prompts_s:.2f} s{_rate(prompt - cached, prompts_s)}\n"
        f"Decoded tokens: {decoded} in {decode_s:.2f} s{_rate(decoded, decode_s)}"
    )


def _rate(tokens: int, seconds: float) -> str:
    return f" ({tokens / seconds:.2f} tokens/s)" if seconds > 0 else ""


class _Silent:
    """What is shown while answers come: nothing on stdout, the throughput once a second on stderr."""

    def __init__(self) -> None:
        self._tokens = 0
        self._done = 0
        self._first_s = 0.0
        self._drawn = False                              # a line of progress stands in the terminal

    def show(self, at: int, delta: Delta, answer: Answer) -> None:
        """What answer_all() calls."""
        if delta.token_ids:
            self._first_s = self._first_s or monotonic()
            self._tokens += len(delta.token_ids)
        self._done += delta.finish_reason is not None

    async def tick(self, count: int) -> None:
        """Once a second, until it is cancelled."""
        while True:
            await anyio.sleep(TICK_S)
            if self._tokens:
                seconds = monotonic() - self._first_s
                line = f"{self._tokens:,} tokens in {seconds:.1f} s ({self._tokens / seconds:,.1f} tokens/s)"
                self._draw(f"{line}, {self._done} of {count} answers are done")

    def _draw(self, line: str) -> None:
        self._drawn = sys.stderr.isatty()
        sys.stderr.write(f"\r\x1b[K{line}" if self._drawn else f"{line}\n")
        sys.stderr.flush()

    def clear(self) -> None:
        """Take the line of progress away."""
        if self._drawn:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._drawn = False


class _Live(_Silent):
    """One answer, as it comes."""

    def show(self, at: int, delta: Delta, answer: Answer) -> None:
        super().show(at, delta, answer)
        sys.stdout.write(clean(delta.text))
        if delta.finish_reason is not None and not answer.text.endswith("\n"):
            sys.stdout.write("\n")
        sys.stdout.flush()


class _InOrder(_Silent):
    """Each answer under its prompt, when it and all before it are done."""

    def __init__(self, prompts: list[str]) -> None:
        super().__init__()
        self._prompts = prompts
        self._texts: dict[int, str] = {}                 # done, but one before it is not
        self._next = 0

    def show(self, at: int, delta: Delta, answer: Answer) -> None:
        super().show(at, delta, answer)
        if delta.finish_reason is not None:
            self._texts[at] = answer.text
            self.clear()
        while self._next in self._texts:
            text, prompt = self._texts.pop(self._next), " ".join(self._prompts[self._next].split())
            self._next += 1
            print(clean(f"[Prompt {self._next}] {prompt[:HEADING_CHARACTERS]}\n{text.strip()}\n"), flush=True)


if __name__ == "__main__":
    sys.exit(main(program="python -m engine.completion"))
