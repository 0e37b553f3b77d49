"""A loaded kernel and the layout of its arguments. nvidia.py makes one for each kernel, and packs arguments before a launch.

The driver is given the addresses of the arguments and reads as many bytes of each as the kernel's parameter has; so sizes are
compared with the kernel's own, once for each combination of types.
"""

import ctypes
import struct
from typing import Any

import numpy as np

from backends.cuda.device import Argument, Array, Kernel
from backends.cuda.driver import succeed
from engine.errors import StepFailed

__all__ = ["Function"]

PLAIN_SHARED_BYTES = 48 << 10        # a block gets more only if its kernel is marked for it
STRUCTURE_ALIGNMENT = 64             # of a tensor map
FORMATS: dict[type, str] = {Array: "Q", int: "Q", np.int32: "i", np.uint32: "I", np.float32: "f", np.int64: "q"}
SIZES: dict[type, int] = {kind: struct.calcsize(code) for kind, code in FORMATS.items()}


class Function:
    """A loaded kernel, and the room where its arguments are laid out for a launch: a slot for each of its parameters."""

    def __init__(self, driver: Any, kernel: Kernel, core: Any) -> None:
        self.driver, self.kernel, self.core = driver, kernel, core      # core keeps the code loaded
        self.handle = succeed(driver.cuKernelGetFunction(core.handle), f"loading {kernel.name}")
        self.shared_bytes = PLAIN_SHARED_BYTES
        self.sizes = [int(info.size) for info in core.arguments_info]
        self.starts: list[int] = []
        end = 0
        for size in self.sizes:
            alignment = 8 if size <= 8 else STRUCTURE_ALIGNMENT
            self.starts.append(-(-end // alignment) * alignment)
            end = self.starts[-1] + size
        room = (ctypes.c_uint8 * (end + STRUCTURE_ALIGNMENT))()
        skipped = -ctypes.addressof(room) % STRUCTURE_ALIGNMENT
        self.slots = memoryview(room)[skipped:]
        base = ctypes.addressof(room) + skipped
        self.pointers = (ctypes.c_void_p * max(1, len(self.sizes)))(*(base + start for start in self.starts))
        self.address = ctypes.addressof(self.pointers)
        self.layouts: dict[tuple[type, ...], struct.Struct] = {}

    def layout(self, types: tuple[type, ...], arguments: tuple[Argument, ...]) -> struct.Struct:
        """How arguments of these types are packed. Raises StepFailed if they are not what the kernel takes."""
        name = self.kernel.name
        for place, kind in enumerate(types):
            if kind not in FORMATS and kind is not bytes:
                raise StepFailed(f"{name}: argument {place} is a {kind.__name__}: give an Array, an int or a NumPy scalar")
        sizes = [len(each) if isinstance(each, bytes) else SIZES[type(each)] for each in arguments]
        if sizes != self.sizes:
            raise StepFailed(f"{name}: arguments of {sizes} bytes are given, it takes {self.sizes}")
        parts, end = ["<"], 0
        for start, size, kind in zip(self.starts, sizes, types, strict=True):
            parts.append(f"{start - end}x" + (f"{size}s" if kind is bytes else FORMATS[kind]))
            end = start + size
        layout = struct.Struct("".join(parts))
        if bytes not in types:                               # of structures the sizes are looked at every time
            self.layouts[types] = layout
        return layout

    def pack(self, arguments: tuple[Argument, ...]) -> None:
        """Write the arguments to the slots. Cheap: it runs before every launch that no graph makes."""
        types = tuple(map(type, arguments))
        layout = self.layouts.get(types) or self.layout(types, arguments)
        values = [each.address if type(each) is Array else each for each in arguments]
        try:
            layout.pack_into(self.slots, 0, *values)
        except struct.error as error:
            raise StepFailed(f"{self.kernel.name}: {error} in {values}") from error

    def allow_shared(self, nbytes: int) -> None:
        """Let blocks have more dynamic shared memory than every kernel may."""
        attribute = self.driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        doing = f"{self.kernel.name}: {nbytes:,} bytes of shared memory"
        succeed(self.driver.cuFuncSetAttribute(self.handle, attribute, nbytes), doing)
        self.shared_bytes = nbytes
