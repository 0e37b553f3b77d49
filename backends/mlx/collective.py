"""Collective: the other ranks of one model, as a rank's graph sees them: sums of branches, and the tokens that rank 0 drew.

Everything is lazy, like the graph. All ranks must evaluate the same sums in the same order, or they wait for each other for
ever: so each sum depends on the one before it, on every rank. Sums go through MLX's ring, on the CPU stream, the same bits
for all: it adds each part in one place and hands the result round.
"""

import os
import sys

import mlx.core as mx

from engine.errors import DeviceUnavailable, StepFailed

__all__ = ["ALONE", "Collective", "check_ring", "meet"]


class Collective:
    """One of `ranks` ranks; group is None for the only one, for which all of this is nothing."""

    def __init__(self, rank: int = 0, ranks: int = 1, group: mx.distributed.Group | None = None) -> None:
        assert (group is None) == (ranks == 1)
        self.rank, self.ranks, self.group = rank, ranks, group

    def total(self, branch: mx.array) -> mx.array:
        """The sum over all ranks, of the branch's shape and type. Evaluating it raises RuntimeError if a rank is gone."""
        return branch if self.group is None else mx.distributed.all_sum(branch, group=self.group)

    def tokens_of_first(self, tokens: mx.array, after: mx.array) -> mx.array:
        """What rank 0 has in `tokens`, (S,) int32; the others' are zeros. after: the states, whose sums come before."""
        if self.group is None or len(tokens) == 0:
            return tokens
        (mine,) = mx.depends([tokens], [after])
        return mx.distributed.all_sum(mine, group=self.group)


ALONE = Collective()


def check_ring() -> None:
    """Raise DeviceUnavailable where ranks cannot be: no ring in this MLX, or a launcher's ranks around us."""
    possible: bool = sys.platform != "win32" and mx.distributed.is_available("ring")
    if not possible:
        raise DeviceUnavailable(
            f"several devices need MLX's ring backend, which this MLX on {sys.platform} does not have: leave --d out"
        )
    for name in ("MLX_HOSTFILE", "MLX_RANK"):
        if name in os.environ:
            raise DeviceUnavailable(
                f"{name} is {os.environ[name]!r}: ranks are processes of this machine alone, which Rillet starts by itself: "
                f"start it without mlx.launch, and unset {name}"
            )


def meet(rank: int, ranks: int) -> Collective:
    """The ring that MLX_HOSTFILE and MLX_RANK describe; each rank calls it once. DeviceUnavailable, StepFailed."""
    try:
        group = mx.distributed.init(strict=True, backend="ring")
    except RuntimeError as error:
        raise DeviceUnavailable(f"rank {rank} does not meet the others: {error}") from error
    if (group.rank(), group.size()) != (rank, ranks):
        raise StepFailed(f"the ring made this rank {group.rank()} of {group.size()}, it is {rank} of {ranks}: start again")
    return Collective(rank, ranks, group)
