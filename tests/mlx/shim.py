"""Executes Metal kernels on any machine: takes the MSL that mx.fast.metal_kernel generates, builds it with g++, runs it.

ShimMetal.metal_kernel stands where mx.fast.metal_kernel stands (KernelLibrary takes it), so the code under test is the
backend's own down to the generated text. Kernels run when they are called, on copies between pages that nobody may touch;
outputs begin as NaNs. What is written through a const_cast is put back into the input's own memory, as on a GPU; to change
an input otherwise is an error. Every run repeats with other orders of threads and threadgroups: all must give the same.
"""

import ctypes
import functools
import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np

from engine.errors import StepFailed
from tests.cuda.emulated_build import build_folder, digest, gxx, stacks
from tests.cuda.emulated_memory import PAGE, Memory, host_bytes

__all__ = ["ShimError", "ShimMetal", "generate", "kernel_text"]

HERE = Path(__file__).parent
THREADS = HERE.parent / "cuda"
FLAGS = ("-std=c++20", "-Og")           # builds take longer than runs
STALE, STALE_BYTES = 40, 128
BYTES = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}
ATTRIBUTES = {
    "thread_position_in_grid": "grid_at", "thread_position_in_threadgroup": "local_at",
    "thread_index_in_threadgroup": "number",
    "threadgroup_position_in_grid": "emulated::block.index", "threads_per_threadgroup": "threads", "threads_per_grid": "all",
    "threadgroups_per_grid": "groups", "thread_index_in_simdgroup": "(number & 31)",
    "simdgroup_index_in_threadgroup": "(number >> 5)", "threads_per_simdgroup": "32u", "thread_execution_width": "32u",
    "simdgroups_per_threadgroup": "(threads.x * threads.y * threads.z / 32)",
}  # fmt: skip
ARRAY = re.compile(r"\bthreadgroup\s+([\w:]+(?:<[^<>;]*>)?)\s+(\w+)\s*((?:\[[^\]]+\])+)\s*;")


class ShimError(AssertionError):
    """A kernel did what a GPU forbids or leaves undefined."""


# ---- the text -----------------------------------------------------------------------------------------------------------


def captured(work: Callable[[], object]) -> str:
    """What C++ prints while it works."""
    sys.stdout.flush()
    kept = os.dup(1)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        try:
            work()
        finally:
            os.dup2(kept, 1)
            os.close(kept)
        file.seek(0)
        return file.read().decode()


def generate(arguments, call) -> str:
    """The MSL that mx.fast.metal_kernel(**arguments) makes of a call, on any machine: exporting traces without running."""
    made = mx.fast.metal_kernel(**arguments)
    inputs = [mx.zeros(array.shape, array.dtype) for array in call["inputs"]]
    rest = {name: value for name, value in call.items() if name != "inputs"}
    text = captured(
        lambda: mx.export_function(lambda _: None, lambda *arrays: made(inputs=list(arrays), verbose=True, **rest), *inputs)
    )
    return text.split("```\n", 1)[1].rsplit("```", 1)[0]


def kernel_text(msl: str) -> tuple[str, str, list[str], list[str]]:
    """The instantiated name, the text without what only Metal knows, the kernel's buffers and its attributes."""
    signature = re.search(r"\[\[kernel\]\] void (\w+)\(\n(.*?)\) \{\n", msl, re.DOTALL)
    name = signature[1]
    instance = re.search(r"\ntemplate \[\[host_name[^;]*?decltype\((\w+(?:<[^;]*?>)?)\)[^;]*;", msl)
    text = msl[: instance.start()] if instance else msl
    instantiated = instance[1] if instance else name
    parameters = [one.strip() for one in signature[2].split(",\n")]
    text = re.sub(r"^\s*#\s*include <metal_\w+>.*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\[\[[^\]]*\]\]", "", text)
    text = ARRAY.sub(r"MSL_THREADGROUP(\1, \2, \3);", text)
    text = re.sub(r"\bthreadgroup\s+(?=(?:const\s+)?[\w:]+(?:<[^<>;]*>)?(?:\s+const)?\s*[*&])", "", text)
    left = re.search(r"^(?!\s*//).*\bthreadgroup\s.*$", re.sub(r"//.*", "", text), re.MULTILINE)
    assert left is None, f"the shim does not know this use of threadgroup: {left[0].strip()}"
    buffers = [one for one in parameters if "[[buffer(" in one]
    attributes = [re.search(r"\[\[(\w+)\]\]", one)[1] for one in parameters if "[[buffer(" not in one]
    return instantiated, text, buffers, attributes


def program(msl: str) -> str:
    """C++ that has shim_launch."""
    name, text, buffers, attributes = kernel_text(msl)
    values = []
    for place, buffer in enumerate(buffers):
        found = re.match(r"(?:const )?(?:device|constant) ([\w<>]+)([*&])", buffer)
        pointer = f"static_cast<{found[1]}*>(buffers[{place}])"
        values.append(pointer if found[2] == "*" else "*" + pointer)
    values += [ATTRIBUTES[one] for one in attributes]
    return f"""#include "msl_shim.h"
#line 1 "generated"
{text}
static void call(void* given) {{
    void** buffers = static_cast<void**>(given);
    const uint* sizes = static_cast<uint*>(buffers[{len(buffers)}]);
    const uint3 threads{{sizes[0], sizes[1], sizes[2]}}, groups{{sizes[3], sizes[4], sizes[5]}};
    const uint3 all{{threads.x * groups.x, threads.y * groups.y, threads.z * groups.z}};
    const uint number = emulated::current->number;
    const uint3 local_at{{number % threads.x, number / threads.x % threads.y, number / (threads.x * threads.y)}};
    const uint3 at = emulated::block.index;
    const uint3 grid_at{{
        at.x * threads.x + local_at.x, at.y * threads.y + local_at.y, at.z * threads.z + local_at.z}};
    {name}({", ".join(values)});
    if (emulated::block.alive == 1) shim::check_fences();
}}
extern "C" int shim_launch(void** buffers, const uint* groups, uint threads, uint seed) {{
    return emulated::launch(call, buffers, groups, threads, shim::ROOM, seed);
}}
"""


@functools.cache
def headers():
    """A folder with msl_shim.h as g++ reads it fastest."""
    texts = {path.name: path.read_text() for path in (HERE / "msl_shim.h", THREADS / "emulated_threads.h")}
    folder = build_folder() / f"metal-headers-{digest(*texts.values(), *FLAGS)}"
    if not (folder / "msl_shim.h.gch").exists():
        folder.mkdir(exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text)
        gxx(folder / "msl_shim.h", folder / "msl_shim.h.gch", "-x", "c++-header", *FLAGS)
    return folder


@functools.cache
def library(msl: str):
    text = program(msl)
    target = build_folder() / f"metal-{digest(headers().name, text, *FLAGS)}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=build_folder()) as place:
            source = Path(place) / "kernel.cpp"
            source.write_text(text)
            try:
                gxx(source, target, "-I", str(headers()), *FLAGS, "-shared")
            except AssertionError as error:           # no proof that a test has found something
                raise RuntimeError(f"the kernel does not compile:\n{error}") from None
    loaded = ctypes.PyDLL(str(target))
    loaded.emulated_message.restype = ctypes.c_char_p
    loaded.emulated_fault_address.restype = ctypes.c_void_p
    loaded.emulated_use_stacks(*(ctypes.c_size_t(n) for n in stacks()))
    return loaded


# ---- running ------------------------------------------------------------------------------------------------------------


def memory_of(array):
    """A view of the bytes of an evaluated, contiguous array: its own memory."""
    view = array if array.itemsize == 1 else array.view(BYTES[array.itemsize])
    return np.array(view.view(mx.uint8).reshape(-1), copy=False)


def bytes_of(array):
    """A copy of an array's bytes in the order of rows."""
    return np.array(mx.contiguous(array).view(BYTES[array.itemsize])).reshape(-1).view(np.uint8)


class ShimMetal:
    """Makes kernels that run here. seeds: the orders in which threads run; edits: {part of a kernel's name: text -> text}."""

    def __init__(self, seeds=(0, 1), edits=None, *, run=True):
        self.seeds, self.edits, self.runs = seeds, edits or {}, run
        self.generated = {}           # variant -> MSL, of each that was called
        self.texts = {}
        self.launches = 0

    def metal_kernel(self, **arguments):
        return functools.partial(self.call, arguments)

    def text(self, arguments, call):
        kinds = tuple((array.dtype, array.ndim, array.size < 8) for array in call["inputs"])
        source = (arguments["name"], arguments["source"], arguments["header"])
        key = (*source, kinds, tuple(call["template"]), tuple(call["output_dtypes"]))
        if key not in self.texts:
            self.texts[key] = generate(arguments, call)
        return self.texts[key]

    def edited(self, name, msl):
        for part, edit in self.edits.items():
            if part in name:
                changed = edit(msl)
                assert changed != msl, f"the edit changes nothing of {name}"
                msl = changed
        return msl

    def call(self, arguments, **call):
        grid, threads = call["grid"], call["threadgroup"]
        count = threads[0] * threads[1] * threads[2]
        if count % 32 or not 32 <= count <= 1024 or any(all_ % one for all_, one in zip(grid, threads, strict=True)):
            raise ShimError(f"{arguments['name']}: grid {grid} of {threads}: threadgroups must be whole, of whole simdgroups")
        if any(n < 1 for n in grid):
            raise ShimError(f"{arguments['name']}: the grid {grid} is empty")
        msl = self.edited(arguments["name"], self.text(arguments, call))
        self.generated[hashlib.sha256(msl.encode()).hexdigest()] = msl
        mx.eval(*call["inputs"])
        outputs = list(zip(call["output_shapes"], call["output_dtypes"], strict=True))
        if not self.runs:
            return [mx.zeros(shape, dtype) for shape, dtype in outputs]
        self.launches += 1
        first = None
        for seed in self.seeds:
            found, written = self.run(arguments, call, msl, seed, outputs)
            first = first or (found, written)
            if any(not np.array_equal(a, b) for a, b in zip(first[0] + first[1], found + written, strict=True)):
                raise ShimError(f"{arguments['name']}: results depend on the order in which threads run")
        for name, array, after in zip(arguments["input_names"], call["inputs"], written, strict=True):
            if name in writable(arguments["source"]):
                memory_of(array)[:] = after
        made = []
        for (shape, dtype), data in zip(outputs, found, strict=True):
            numbers = data.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[dtype.size])
            made.append(mx.array(numbers).view(dtype).reshape(shape))
        mx.eval(*made)
        return made

    def run(self, arguments, call, msl, seed, outputs):
        """The bytes of outputs and of inputs after one run."""
        memory = Memory(1 << 33, low=bool(seed % 2))
        try:
            _, _, buffers, _ = kernel_text(msl)
            inputs = dict(zip(arguments["input_names"], call["inputs"], strict=True))
            before = {name: bytes_of(array) for name, array in inputs.items()}
            sizes = dict(zip(arguments["output_names"], outputs, strict=True))
            addresses, metadata, behind = {}, [], {}
            for buffer in buffers:
                name = re.search(r"(\w+) \[\[buffer", buffer)[1]
                if name in before:
                    addresses[name] = memory.allocate(max(1, before[name].size))
                    host_bytes(addresses[name], before[name].size)[:] = before[name]
                    if seed % 2 == 0 and inputs[name].dtype == mx.int32:
                        behind[name] = stale(addresses[name] + before[name].size)
                elif name in sizes:
                    shape, dtype = sizes[name]
                    addresses[name] = memory.allocate(int(np.prod(shape)) * dtype.size)
                else:
                    owner, what = name.rsplit("_", 1)
                    array = inputs[owner]
                    strides = np.cumprod([1, *array.shape[:0:-1]])[::-1]
                    data = {"shape": np.array(array.shape, np.int32), "strides": strides.astype(np.int64),
                            "ndim": np.array([array.ndim], np.int32)}[what]  # fmt: skip
                    metadata.append(np.ascontiguousarray(data))
                    addresses[name] = metadata[-1].ctypes.data
            groups = [all_ // one for all_, one in zip(call["grid"], call["threadgroup"], strict=True)]
            counts = (ctypes.c_uint * 6)(*call["threadgroup"], *groups)
            pointers = (ctypes.c_void_p * (len(buffers) + 1))(*addresses.values(), ctypes.addressof(counts))
            loaded = library(msl)
            threads = counts[0] * counts[1] * counts[2]
            if loaded.shim_launch(pointers, (ctypes.c_uint * 3)(*groups), ctypes.c_uint(threads), ctypes.c_uint(seed)):
                address = loaded.emulated_fault_address()
                near = memory.near(address) if address else ""
                raise ShimError(f"{arguments['name']}: {loaded.emulated_message().decode()}{near}")
            for name, numbers in behind.items():
                if (numbers != STALE).any():
                    raise ShimError(f"{arguments['name']}: {name}: something wrote behind the end of an allocation")
                numbers[:] = -1
            self.check_borders(arguments, memory, addresses)
            written = [host_bytes(addresses[name], old.size).copy() for name, old in before.items()]
            for (name, old), new in zip(before.items(), written, strict=True):
                if name not in writable(arguments["source"]) and not np.array_equal(old, new):
                    raise ShimError(f"{arguments['name']}: the input {name} was changed")
            lengths = [int(np.prod(shape)) * dtype.size for shape, dtype in outputs]
            return [host_bytes(addresses[name], length).copy() for name, length in zip(sizes, lengths, strict=True)], written
        finally:
            memory.close()

    @staticmethod
    def check_borders(arguments, memory, addresses):
        for name, address in addresses.items():
            if address in memory.allocations:
                try:
                    memory.check_borders(address)
                except StepFailed as error:
                    raise ShimError(f"{arguments['name']}: {name}: {error}") from None


def stale(address):
    """What may lie behind a buffer on a device that hands freed memory out again: numbers that look like pages or lengths.

    A view of what was written: as much as there is before the next page.
    """
    numbers = host_bytes(address, min(STALE_BYTES, -address % PAGE) & -4).view(np.int32)
    numbers[:] = STALE
    return numbers


@functools.cache
def writable(source):
    """The inputs that a kernel takes the const from."""
    found = set()
    for inside in re.findall(r"const_cast<device [^>]*>\(([^;]*?)\)", source):
        found |= set(re.findall(r"\w+", inside))
    return found
