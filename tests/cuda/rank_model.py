"""A backend that computes a model without a context in NumPy, sharded as the CUDA backend is, on emulated memory. Ranks of
test_parallel.py run it in real processes: python -m backends.cuda.rank finds `seat` (and the ones that fail) by name.
"""

import os
import sys
from dataclasses import dataclass

import numpy as np

from backends.cuda.collective import Alone, StagedCollective
from backends.cuda.device import make_array
from backends.cuda.seat import Seat
from backends.cuda.sharding import ShardedSource
from engine.backend import BackendInfo, MemoryStatistics
from engine.errors import DeviceUnavailable, OutOfDeviceMemory
from engine.step import StepOutput
from tests.cuda.branches import attention_branch, feed_branch, weights_of
from tests.cuda.emulated_device import EmulatedDevice

PLACES = 16


@dataclass(frozen=True)
class ModelTicket:
    number: int


class RankModel:
    """`steps_to_live`: the step before which this rank's process ends without a word."""

    def __init__(self, device, collective, *, pages=100, steps_to_live=None, fails_to_load=False):
        self.device, self.collective = device, collective
        self.pages, self.steps_to_live, self.fails_to_load = pages, steps_to_live, fails_to_load
        self.info = BackendInfo("cuda", "emulated", 32, 64, PLACES, 8, frozenset())
        self.stream = device.stream()
        self.outputs, self.count, self.closed = {}, 0, False

    def load(self, spec, tensors, options, progress):
        if self.fails_to_load:
            raise OutOfDeviceMemory("the weights take 9 GB, 5 are free: take a smaller model")
        source = ShardedSource(tensors, spec, self.collective.rank, self.collective.ranks)
        self.spec, self.w = source.spec, weights_of(source)
        self.newest = make_array(self.device, "i32", PLACES)
        progress("loading weights", 1, 1)

    def allocate_cache(self, budget_bytes):
        return self.pages

    def memory(self):
        return MemoryStatistics(1, 10, 100)

    def summed(self, branch):
        array = self.device.put(np.ascontiguousarray(branch, np.float32))
        self.collective.all_reduce(self.stream, array)
        total = self.device.get(array)
        self.device.release(array.address)
        return total

    def submit(self, step):
        self.count += 1
        if self.count == self.steps_to_live:
            print("Fatal: a cosmic ray", file=sys.stderr, flush=True)
            os._exit(9)
        drawn = self.device.get(self.newest) if (step.tokens < 0).any() else np.zeros(PLACES, np.int32)
        x = self.w["embedding"][np.where(step.tokens < 0, drawn[np.minimum(-1 - step.tokens, PLACES - 1)], step.tokens)]
        for number, layer in enumerate(self.spec.layers):
            x = x + self.summed(attention_branch(layer, self.w, f"layers.{number}.", x))
            x = x + self.summed(feed_branch(layer, self.w, f"layers.{number}.", x))
        tokens = np.zeros(PLACES, np.int32)
        if self.collective.rank == 0:
            output = self.w["embedding" if self.spec.tied_output else "output"]
            tokens[: step.place_count] = (x[step.sample_at] @ output.T).argmax(1)
        else:
            assert step.history is None
            tokens -= 7                                  # nobody draws here
        self.stream.copy_in(self.newest.address, tokens)
        self.collective.broadcast(self.stream, self.newest)
        self.outputs[self.count] = step.place_count
        return ModelTicket(self.count)

    def wait(self, ticket):
        places = self.outputs.pop(ticket.number)
        none = np.zeros((places, 0))
        return StepOutput(
            self.device.get(self.newest)[:places], np.zeros(places, np.float32), none.astype(np.int32),
            none.astype(np.float32), np.zeros((0, 0), np.float32),
        )  # fmt: skip

    def close(self):
        if not self.closed:
            self.closed = True
            self.collective.close()
            self.device.close()


def seat(place, **options):
    device = EmulatedDevice(memory_bytes=1 << 24)
    collective = Alone() if place.ranks == 1 else StagedCollective(device, place.rank, place.ranks, place.links)
    return Seat(RankModel(device, collective, pages=100 - place.rank, **options), collective)


def seat_where_the_last_dies(place):
    return seat(place, steps_to_live=3 if place.rank == place.ranks - 1 > 0 else None)


def seat_where_the_first_fails(place):
    made = seat(place)
    if place.rank == 0 and place.ranks > 1:
        made.backend.submit = None                       # not callable
    return made


def seat_where_the_last_has_too_little_memory(place):
    return seat(place, fails_to_load=place.rank == place.ranks - 1 > 0)


def seat_where_the_last_has_no_device(place):
    if place.rank == place.ranks - 1 > 0:
        raise DeviceUnavailable(f"there is no GPU {place.device_id}: see nvidia-smi")
    return seat(place)


def seat_where_the_last_ends_at_once(place):
    if place.rank == place.ranks - 1 > 0:
        os._exit(5)
    return seat(place)


def seat_where_the_last_hangs(place):
    """And ignores that it should end."""
    made = seat(place)
    if place.rank == place.ranks - 1 > 0:
        import signal
        import threading

        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        made.backend.close = threading.Event().wait
    return made
