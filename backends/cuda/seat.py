"""A rank's seat: its backend, and the collective through which it meets the others. Made in each rank's process.

Which factory makes it goes by name to the children, so that tests can seat something else than a GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import NamedTuple, cast

from backends.cuda.collective import Alone, Collective, Links, StagedCollective
from engine.backend import Backend

__all__ = ["CUDA_SEAT", "Factory", "Place", "Seat", "cuda_seat", "find_factory"]


@dataclass(frozen=True, slots=True)
class Place:
    """Who a rank is. nccl_id: of the NCCL group, None where sums go through `links`, the connections to the other ranks."""

    rank: int
    ranks: int
    device_id: int
    nccl_id: bytes | None
    links: Links


class Seat(NamedTuple):
    backend: Backend
    collective: Collective


Factory = Callable[[Place], Seat]
CUDA_SEAT = "backends.cuda.seat:cuda_seat"


def find_factory(name: str) -> Factory:
    """ "module:function" -> the function."""
    module, _, function = name.partition(":")
    return cast(Factory, getattr(import_module(module), function))


def cuda_seat(place: Place) -> Seat:
    """The backend of one GPU. Raises DeviceUnavailable."""
    from backends.cuda.nvidia import NvidiaDevice
    from backends.cuda.runner import CudaBackend

    device = NvidiaDevice(place.device_id)
    collective: Collective = Alone()
    if place.ranks > 1 and place.nccl_id is not None:
        from backends.cuda.nccl import NcclCollective

        collective = NcclCollective(place.nccl_id, place.rank, place.ranks, device.enter)
    elif place.ranks > 1:
        collective = StagedCollective(device, place.rank, place.ranks, place.links)
    return Seat(CudaBackend(device, collective=collective), collective)
