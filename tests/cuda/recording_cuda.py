"""A stand-in for cuda.core and the driver's bindings that remembers calls, for tests of nvidia.py on machines without a GPU.

Where there is no libcuda, each driver call is made to the real bindings first: they convert the arguments, refuse those of
wrong types, and only then find that there is no driver. So the stand-in takes nothing that the bindings would not.
"""

import ctypes
from types import SimpleNamespace

import pytest
from cuda.bindings import driver as bindings

GOOD = bindings.CUresult.CUDA_SUCCESS


def has_driver():
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


class RecordingDriver:
    """The driver API: answers are given by name, all else returns nothing but success."""

    def __init__(self, **answers):
        self.calls = []
        self.launches = []
        self.parameter_sizes = []
        self.next_address = 0x7_0000_0000
        self.answers = {
            "cuDriverGetVersion": 13000, "cuDeviceGetCount": 1, "cuMemGetInfo": (7 << 30, 8 << 30),
            "cuKernelGetFunction": bindings.CUfunction(77),
        } | answers  # fmt: skip

    def __getattr__(self, name):
        if not name.startswith("cu") or not callable(getattr(bindings, name)) or isinstance(getattr(bindings, name), type):
            return getattr(bindings, name)
        return lambda *arguments: self.call(name, arguments)

    def call(self, name, arguments):
        if not has_driver():
            with pytest.raises(RuntimeError, match="driver library"):
                getattr(bindings, name)(*arguments)
        self.calls.append((name, *arguments))
        answer = self.answers.get(name)
        if isinstance(answer, bindings.CUresult):
            return (answer,) if name != "cuMemAlloc" else (answer, None)
        if name == "cuMemAlloc":
            self.next_address += 1 << 20
            return GOOD, bindings.CUdeviceptr(self.next_address)
        if name == "cuMemHostAlloc":
            self.host = (ctypes.c_uint8 * arguments[0])()
            return GOOD, ctypes.addressof(self.host)
        if name == "cuLaunchKernel":
            pointers = (ctypes.c_void_p * len(self.parameter_sizes)).from_address(arguments[9])
            sizes = zip(pointers, self.parameter_sizes, strict=True)
            self.launches.append([ctypes.string_at(at, size) for at, size in sizes])
        if answer is None:
            return (GOOD,)
        return (GOOD, *answer) if isinstance(answer, tuple) else (GOOD, answer)

    def names(self):
        return [name for name, *_ in self.calls]


class RecordingCore:
    """cuda.core: as much of it as nvidia.py uses."""

    def __init__(self, driver, *, capability=(9, 0)):
        self.driver, self.capability = driver, capability
        self.log = []
        self.failing = None                  # an exception that the next call raises
        outer = self

        class ObjectCode:
            @staticmethod
            def from_cubin(code, *, name=""):
                assert code[:4] == b"\x7fELF"
                return SimpleNamespace(get_kernel=lambda symbol: SimpleNamespace(
                    handle=bindings.CUkernel(5), symbol=symbol,
                    arguments_info=[SimpleNamespace(size=size) for size in outer.driver.parameter_sizes],
                ))  # fmt: skip

        self.ObjectCode = ObjectCode

    def note(self, what):
        if self.failing:
            raise self.failing
        self.log.append(what)

    def Device(self, index):  # noqa: N802
        return SimpleNamespace(
            name="Recording 9000", compute_capability=self.capability, set_current=lambda: self.note("current"),
            properties=SimpleNamespace(multiprocessor_count=132, max_shared_memory_per_block_optin=227 << 10),
            create_stream=lambda: self.stream(), sync=lambda: self.note("sync device"),
        )  # fmt: skip

    def stream(self):
        event = SimpleNamespace(sync=lambda: self.note("sync event"))
        graph = SimpleNamespace(upload=lambda stream: self.note("upload"), launch=lambda stream: self.note("replay"))
        builder = SimpleNamespace(
            begin_building=lambda mode: self.note(f"begin {mode}"), complete=lambda: graph,
            close=lambda: self.note("close builder"),
        )  # fmt: skip
        builder.end_building = lambda: self.note("end") or builder
        return SimpleNamespace(
            handle=bindings.CUstream(9), record=lambda: self.note("record") or event, wait=lambda event: self.note("wait"),
            create_graph_builder=lambda: builder, close=lambda: self.note("close stream"),
        )  # fmt: skip


def recording_device(*, capability=(9, 0), **answers):
    """NvidiaDevice on stand-ins, and the two stand-ins."""
    from backends.cuda.nvidia import NvidiaDevice

    driver = RecordingDriver(**answers)
    core = RecordingCore(driver, capability=capability)
    return NvidiaDevice(libraries=SimpleNamespace(core=core, driver=driver)), driver, core
