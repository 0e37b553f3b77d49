"""Ranks as threads of this process, for tests: ParallelBackend's team without processes, and sums between emulated devices.

    sums = Sums(2)
    seat = lambda place: Seat(CudaBackend(EmulatedDevice(), collective=c := sums.collective(place.rank)), c)
    backend = ParallelBackend(seat, thread_team(seat))         # and then LoadOptions(device_ids=(0, 1), checkpoint=path)
"""

import socket
from threading import Barrier, BrokenBarrierError, Thread

from backends.cuda.collective import RankLost, sum_in_order
from backends.cuda.rank import serve
from backends.cuda.seat import Place
from backends.cuda.team import Peer, Team
from engine.errors import StepFailed
from engine.wire import Connection
from tests.cuda.emulated_memory import host_bytes

TIMEOUT_S = 20


def thread_team(factory):
    """A `start` for ParallelBackend. factory(place) -> Seat, called once per rank, of rank 0 too."""

    def start(device_ids):
        ranks = len(device_ids)
        sums = {rank: pair() for rank in range(1, ranks)}
        peers = []
        for rank in range(1, ranks):
            ours, theirs = pair()
            place = Place(rank, ranks, device_ids[rank], None, lambda rank=rank: {0: sums[rank][1]})
            peers.append(Peer(rank, device_ids[rank], ours, RankThread(place, theirs, factory)))
        links = {rank: ends[0] for rank, ends in sums.items()}
        return Team(
            factory(Place(0, ranks, device_ids[0], None, lambda: links)), tuple(peers),
            lambda: [end.close() for ends in sums.values() for end in ends],
        )  # fmt: skip

    return start


def pair():
    return tuple(Connection(end) for end in socket.socketpair())


class RankThread:
    """backends.cuda.team.Life of a thread."""

    def __init__(self, place, connection, factory):
        self.place, self.connection, self.factory = place, connection, factory
        self.problem = None
        self.thread = Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        try:
            serve(self.connection, self.factory(self.place))
        except Exception as error:
            self.problem = error
        finally:
            self.connection.close()

    def last_words(self):
        self.thread.join(TIMEOUT_S)
        return repr(self.problem)

    def end(self, wait_s):
        self.thread.join(wait_s)
        self.connection.close()
        self.thread.join(TIMEOUT_S)


class Sums:
    """Collectives of ranks with an emulated device each, whose sums are work of their streams: they may stand in graphs."""

    def __init__(self, ranks):
        self.ranks = ranks
        self.parts = [None] * ranks
        self.barrier = Barrier(ranks)

    def collective(self, rank):
        return StreamCollective(self, rank)

    def exchange(self, rank, part):
        """Everybody's parts, in the order of ranks."""
        self.parts[rank] = part
        self.barrier.wait(TIMEOUT_S)
        parts = list(self.parts)
        self.barrier.wait(TIMEOUT_S)
        return parts


class StreamCollective:
    capturable = True

    def __init__(self, sums, rank):
        self.sums, self.rank, self.ranks = sums, rank, sums.ranks
        self.failure = None
        self.calls = 0

    def open(self):
        pass

    def all_reduce(self, stream, array):
        self.add(stream, array, lambda parts: sum_in_order(parts, array.item))

    def broadcast(self, stream, array, root=0):
        self.add(stream, array, lambda parts: parts[root])

    def add(self, stream, array, combine):
        def work():
            self.check()
            self.calls += 1
            here = host_bytes(array.address, array.nbytes)
            try:
                here[:] = combine(self.sums.exchange(self.rank, here.copy()))
            except BrokenBarrierError:
                raise RankLost(self.failure or "a rank is lost") from None

        self.check()
        stream.add("a sum over ranks", work)

    def check(self):
        if self.failure is not None:
            raise StepFailed(self.failure)

    def abort(self, why):
        self.failure = self.failure or why
        self.sums.barrier.abort()

    def close(self):
        self.abort("closed")
