"""The chat of a person in a terminal: prompt_toolkit reads, rich writes. engine.chat imports this only when there is one.

Ctrl-C stops an answer; at an empty prompt it warns, and a second one leaves, as Ctrl-D does.
"""

import asyncio
import difflib
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from engine.conversation import Conversation, clean, on_interrupt
from engine.errors import ContextTooLong, Overloaded, RequestError

__all__ = ["LoadingBar", "TerminalChat"]

COMMANDS = {
    "/reset": ("", "forget the conversation; the system prompt stays"),
    "/system": ("TEXT", "set the system prompt; without TEXT there is none"),
    "/save": ("FILE", "write the conversation as JSON"),
    "/load": ("FILE", "go on with a saved conversation"),
    "/help": ("", "this list"),
    "/exit": ("", "leave, as Ctrl-D does"),
}
KEYS = "Enter sends, Alt-Enter begins a new line, Ctrl-C stops an answer, Ctrl-D leaves, /help lists the commands."


class LoadingBar:
    """The `progress` of an Engine: a bar per stage on stderr until stop(). Called from the device thread."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn(),
            console=Console(stderr=True), transient=True,
        )  # fmt: skip
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what)
            self._progress.start()                       # late, so that a download's own bar has the terminal
        self._progress.update(self._tasks[what], completed=done, total=total or None)

    def stop(self) -> None:
        """Take the bars away and give the cursor back; idempotent."""
        self._progress.stop()


class TerminalChat:
    """Reads turns and commands until the person leaves. The keywords stand in for the terminal in tests."""

    def __init__(
        self, conversation: Conversation, *, console: Console | None = None, input: Input | None = None,
        output: Output | None = None,
    ) -> None:  # fmt: skip
        self.conversation = conversation
        self.engine = conversation.engine
        self.console = console or Console(highlight=False)
        self._warned = False                             # that a second Ctrl-C leaves
        self.session: PromptSession[str] = PromptSession(
            history=InMemoryHistory(), key_bindings=_bindings(), prompt_continuation="  ", input=input, output=output
        )

    async def run(self) -> None:
        engine = self.engine
        self._say(f"{engine.model_name} on {engine.device}, context length {engine.context_length:,} tokens", "bold")
        self._say(KEYS, "dim")
        while (line := await self._read()) is not None:
            text = line.strip()
            self._warned = self._warned and not text
            if text.startswith("/") and not line.startswith(" "):
                if not await self._command(text):
                    return
            elif text:
                await self._answer(text)

    async def _read(self) -> str | None:
        """What was typed; None to leave."""
        try:
            return await self.session.prompt_async("> ", rprompt=self._tokens_left)
        except EOFError:
            return None
        except KeyboardInterrupt:
            if self.session.default_buffer.text.strip():
                return ""                                # as in a shell, the line is dropped
            if self._warned or not self.conversation.turns:
                return None
            self._warned = True
            self._say("Ctrl-C again leaves; /reset forgets the conversation.", "yellow")
            return ""

    def _tokens_left(self) -> StyleAndTextTuples:
        left = self.conversation.tokens_left
        share = left / self.engine.context_length
        colour = "ansigreen" if share > 0.5 else "ansiyellow" if share > 0.1 else "ansired"
        return [(f"fg:{colour}", f"tokens left: {left:,}")]

    async def _answer(self, text: str) -> None:
        loop = asyncio.get_running_loop()
        wrote = False

        def show(piece: str) -> None:
            nonlocal wrote
            wrote = True
            self.console.out(clean(piece), end="", highlight=False)

        try:
            with on_interrupt(lambda: loop.call_soon_threadsafe(self.conversation.stop)):
                turn = await self.conversation.ask(text, show)
        except ContextTooLong as error:
            self._say(f"{error}, or type /reset to start anew", "red")
            return
        except (RequestError, Overloaded) as error:
            self._say(str(error), "red")
            return
        finally:
            if wrote:
                self.console.out("")
        if turn.finish_reason == "abort":
            self._say("(stopped)", "yellow")
        elif turn.finish_reason == "length":
            full = self.conversation.tokens_left == 0
            cure = "the context is full: /reset starts anew" if full else "--max-tokens allows no more"
            self._say(f"(the answer was cut: {cure})", "yellow")
        self._say(str(turn), "dim")

    async def _command(self, line: str) -> bool:
        """Carry out a /command; False to leave."""
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        match word:
            case "/exit":
                return False
            case "/help":
                for name, (argument, what) in COMMANDS.items():
                    self._say(f"{name + ' ' + argument:<13} {what}")
                self._say(KEYS, "dim")
            case "/reset":
                self.conversation.reset()
                self._say("The conversation begins anew.")
            case "/system":
                self.conversation.system = rest or None
                self._say("The system prompt is set." if rest else "There is no system prompt now.")
            case "/save" | "/load":
                await self._file(word, rest)
            case _:
                close = difflib.get_close_matches(word, COMMANDS, 1) or ["/help"]
                self._say(f"{word[:40]} is no command: did you mean {close[0]}? A space before it sends it as text.", "red")
        return True

    async def _file(self, word: str, name: str) -> None:
        if not name:
            self._say(f"{word} needs the name of a file", "red")
            return
        try:
            path = Path(name).expanduser()  # noqa: ASYNC240 - nobody else is served here
            if word == "/save":
                self.conversation.save(path)
                self._say(f"Saved to {path}.")
            else:
                await self.conversation.load(path)
                self._say(f"Loaded {len(self.conversation.turns)} messages from {path}.")
        except (OSError, RuntimeError, RequestError) as error:           # RuntimeError: ~somebody who is unknown here
            self._say(f"{word}: {error}", "red")

    def _say(self, text: str, style: str | None = None) -> None:
        self.console.out(clean(text), style=style, highlight=False)


def _bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings
