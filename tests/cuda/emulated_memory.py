"""The emulated device's memory: allocations between pages that nobody may touch, NaNs until written, gone once released.

emulated_device.py has one Memory. What lies beside an allocation on its own pages is checked for writes; memory costs nothing
before it is written, so that 100 GB can be allocated.
"""

import bisect
import ctypes
import functools
import mmap
import os

import numpy as np

from engine.errors import OutOfDeviceMemory, StepFailed

__all__ = ["PAGE", "Memory", "host_bytes", "libc", "reserve"]

PAGE = mmap.PAGESIZE
GUARD = 1 << 20                       # addresses on each side of an allocation that fault
CHUNK = 16 << 20
GRAIN = 256                           # an allocation begins at a multiple
NO_ACCESS, NO_RESERVE, FIXED = 0, 0x4000, 0x10
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def host_bytes(address, nbytes):
    """A view of memory by its address."""
    return np.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), np.uint8) if nbytes else np.zeros(0, np.uint8)


def map_at(address, length, protection, flags, file=-1):
    got = libc.mmap(address, length, protection, flags | mmap.MAP_PRIVATE, file, 0)
    if got in (None, ctypes.c_void_p(-1).value):
        raise MemoryError(f"mmap of {length:,} bytes: {os.strerror(ctypes.get_errno())}")
    return got


def reserve(length):
    """Addresses that nobody may touch."""
    return map_at(None, length, NO_ACCESS, mmap.MAP_ANONYMOUS | NO_RESERVE)


@functools.cache
def ones():
    """A file of CHUNK bytes 0xFF: what is mapped from it costs no memory before it is written."""
    file = os.memfd_create("ones")
    for _ in range(CHUNK >> 20):
        os.write(file, b"\xff" * (1 << 20))
    return file


class Memory:
    """Allocations of one device. `low`: they begin right behind a page that faults; else they end right before one."""

    def __init__(self, nbytes, *, low):
        self.nbytes, self.low = nbytes, low
        self.used = 0
        self.addresses = []               # in order
        self.allocations = {}             # address -> (bytes, mapping, its length)
        self.released = {}                # mapping -> (its length, address, bytes); kept so that no other memory comes there

    def allocate(self, nbytes):
        if nbytes <= 0:
            raise ValueError(f"{nbytes} bytes were asked for, it must be at least 1")
        if nbytes > self.nbytes - self.used:
            raise OutOfDeviceMemory(f"{nbytes:,} bytes of device memory cannot be had, {self.nbytes - self.used:,} are free")
        room = -(-nbytes // GRAIN) * GRAIN
        inside = -(-room // PAGE) * PAGE
        base = reserve(inside + 2 * GUARD)
        for at in range(0, inside, CHUNK):
            part = min(CHUNK, inside - at)
            map_at(base + GUARD + at, part, mmap.PROT_READ | mmap.PROT_WRITE, FIXED | NO_RESERVE, ones())
        address = base + GUARD + (0 if self.low else inside - room)
        self.allocations[address] = nbytes, base, inside + 2 * GUARD
        bisect.insort(self.addresses, address)
        self.used += nbytes
        return address

    def release(self, address):
        if address not in self.allocations:
            raise StepFailed(f"{address:#x} is released, but no allocation begins there")
        self.check_borders(address)
        nbytes, base, length = self.allocations.pop(address)
        self.addresses.remove(address)
        self.used -= nbytes
        map_at(base, length, NO_ACCESS, FIXED | mmap.MAP_ANONYMOUS | NO_RESERVE)
        self.released[base] = length, address, nbytes

    def check(self, address, nbytes, what):
        """Raise StepFailed unless all bytes lie in one allocation."""
        place = bisect.bisect_right(self.addresses, address) - 1
        if place >= 0:
            start = self.addresses[place]
            if address + nbytes <= start + self.allocations[start][0]:
                return
        where = f"address {address:#x}{self.near(address)}"
        raise StepFailed(f"{what} of {nbytes:,} bytes touches memory that is not there: {where}")

    def check_borders(self, address):
        """Raise StepFailed if something was written beside an allocation."""
        nbytes, base, length = self.allocations[address]
        for start, stop in ((base + GUARD, address), (address + nbytes, base + length - GUARD)):
            wrong = np.flatnonzero(host_bytes(start, stop - start) != 0xFF)
            if len(wrong):
                where = start + int(wrong[0]) - address
                side = f"{-where} bytes before" if where < 0 else f"{where - nbytes} bytes behind the end of"
                raise StepFailed(f"something wrote {side} an allocation of {nbytes:,} bytes")

    def check_all(self):
        for address in self.addresses:
            self.check_borders(address)

    def near(self, address):
        """What lies next to an address, in words."""
        known = [(start, nbytes, "an allocation") for start, (nbytes, _, _) in self.allocations.items()]
        known += [(start, nbytes, "released memory") for _, start, nbytes in self.released.values()]
        best = min(known, key=lambda entry: max(entry[0] - address, address - entry[0] - entry[1] + 1), default=None)
        if best is None:
            return ""
        start, nbytes, name = best
        if address < start:
            distance = start - address
            return f", {distance:,} bytes before {name} of {nbytes:,} bytes" if distance < 1 << 32 else ""
        if address < start + nbytes:
            return f", byte {address - start:,} of {name} of {nbytes:,} bytes"
        distance = address - start - nbytes
        return f", {distance:,} bytes behind the end of {name} of {nbytes:,} bytes" if distance < 1 << 32 else ""

    def close(self):
        for _, base, length in self.allocations.values():
            libc.munmap(base, length)
        for base, (length, _, _) in self.released.items():
            libc.munmap(base, length)
        self.allocations.clear()
        self.released.clear()
        self.addresses.clear()
        self.used = 0
