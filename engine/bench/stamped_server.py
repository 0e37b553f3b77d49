"""`rillet serve` that also notes when each token was drawn: `python -m engine.bench.stamped_server FILE [flags of serve]`.

FILE is written when the server ends: JSON, by the first number of a request's prompt the times of its tokens, on the clock
that all processes of a machine share. serving.py starts it and holds its clients' arrivals against them.
"""

import json
import sys
import time
from pathlib import Path
from typing import cast

from engine import cli
from engine.backend import CallingTicket, Ticket
from engine.core import Core
from engine.packing import Plan
from engine.step import StepOutput

__all__ = ["main"]


class Stamps:
    """Times by request, taken where a step's wait returns or its backend calls back."""

    def __init__(self) -> None:
        self.drawn: dict[int, list[float]] = {}
        self.returned: dict[int, float] = {}             # id of an output -> when the device gave it

    def install(self) -> None:
        turn, step, deliver = Core._turn, Core._step, Core._deliver

        def stamped_turn(
            core: Core, plan: Plan | None, previous: Ticket | None
        ) -> tuple[Ticket | None, StepOutput | None]:
            ticket, output = turn(core, plan, previous)
            if output is not None:
                self.returned[id(output)] = time.perf_counter()
            return ticket, output

        async def stamped_step(
            core: Core, plan: Plan | None, previous: Ticket | None
        ) -> tuple[Ticket | None, StepOutput | None]:
            called: list[float] = []
            if previous is not None and core.calls_back:
                cast(CallingTicket, previous).when_done(lambda: called.append(time.perf_counter()))
            ticket, output = await step(core, plan, previous)
            if output is not None and called:
                self.returned.setdefault(id(output), called[0])
            return ticket, output

        def stamped_deliver(core: Core, plan: Plan, output: StepOutput) -> None:
            when = self.returned.pop(id(output))
            for sequence in plan.draws:
                self.drawn.setdefault(sequence.tokens[0], []).append(when)
            deliver(core, plan, output)

        Core._turn, Core._step, Core._deliver = stamped_turn, stamped_step, stamped_deliver      # type: ignore


def main(arguments: list[str]) -> int:
    stamps = Stamps()
    stamps.install()
    try:
        return cli.main(["serve", *arguments[1:]])
    finally:
        Path(arguments[0]).write_text(json.dumps(stamps.drawn), "utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
