"""How many tokens of prompts go beside decoding rows: as many as leave the running streams their pace. The core asks.

The scheduler knows no clock; the core tells a Pace how long each step took, and sets the scheduler's bound from it. A step of
decoding rows alone takes so long; each token of a prompt adds so much. One prompt gets as much of a step as all the decoding
rows together; each more that waits gets as much again, because whoever waits for a first token sees nothing at all; and no
step is shortened below BEARABLE_S: nobody reads faster.
"""

from math import inf

__all__ = ["Pace"]

CROWD = 8           # prompts that count
BEARABLE_S = 0.035  # of a step
SHARE = 0.25        # of a new measurement in what is known
OUTLIER = 1.5       # times what is known: more is not believed at once
LEAST = 4           # tokens: a prompt goes on, whatever it costs the others


class Pace:
    """Learns from steps. first: the bound as long as nothing is known; most: the bound above all."""

    def __init__(self, first: int, most: int) -> None:
        self._first, self._most = first, most
        self._decode_s: dict[int, float] = {}           # by the bits of the number of rows: 1, 2-3, 4-7, ...
        self._token_s: float | None = None

    def observe(self, decoding: int, prompt_tokens: int, seconds: float) -> None:
        """A step of so many decoding rows and tokens of prompts took so long; a clock that did not move says nothing."""
        if not 0 < seconds < inf:
            return
        bits = decoding.bit_length()
        if not prompt_tokens:
            self._decode_s[bits] = _mixed(self._decode_s.get(bits), seconds)
            return
        alone = self._decode_of(bits) if decoding else 0.0
        if alone is not None and seconds < alone:        # the rows cannot take longer than all of the step: they did once
            alone = self._decode_s[bits] = _mixed(alone, seconds)
        if alone is not None and (decoding or prompt_tokens >= LEAST):
            self._token_s = _mixed(self._token_s, max(seconds - alone, seconds / 100) / prompt_tokens)

    def bound(self, decoding: int, prompts: int = 1) -> int:
        """Tokens that so many prompts may bring to a step of so many decoding rows, LEAST at least."""
        alone = self._decode_of(decoding.bit_length())
        if alone is None or self._token_s is None:
            return self._first
        spare = max(alone * min(max(prompts, 1), CROWD), BEARABLE_S - alone)
        return int(min(max(spare / self._token_s, LEAST), self._most))

    def _decode_of(self, bits: int) -> float | None:
        """Seconds of a step of decoding rows, from the nearest number that was seen; the lower one of two as near."""
        if not self._decode_s:
            return None
        return self._decode_s[min(self._decode_s, key=lambda known: (abs(known - bits), known))]


def _mixed(known: float | None, new: float) -> float:
    """One step that was held up (a paused machine, memory from disk) does not count for more than a few times the others."""
    return new if known is None else (1 - SHARE) * known + SHARE * min(new, OUTLIER * known)
