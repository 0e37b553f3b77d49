"""backends.cuda.nvidia without a GPU: what it tells the driver, and what it makes of the driver's answers."""

import gc
import struct
import time

import numpy as np
import pytest

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed: pip install rillet[cuda]")

from cuda.bindings import driver as bindings

from backends.cuda import nvidia
from backends.cuda.cubins import Cubin, KernelFacts
from backends.cuda.device import Array, DeviceFacts, Kernel
from backends.cuda.driver import Libraries
from backends.cuda.nvidia import NvidiaDevice
from engine.errors import DeviceUnavailable, OutOfDeviceMemory, StepFailed
from tests.cuda.recording_cuda import has_driver, recording_device

NORM = Kernel("some.cu", "some_norm<true>")
NORM_SIZES = [8, 8, 8, 8, 4, 4]              # four pointers, int, float
ADDRESS = 0x7F12_3456_7800


@pytest.fixture
def cubins(monkeypatch):
    """Code for every kernel that is asked for, none of which runs here."""
    facts = {NORM.name: KernelFacts("symbol")}
    code = {NORM.file: Cubin(b"\x7fELF", facts)}
    monkeypatch.setattr(nvidia, "find_cubins", lambda kernels, architecture: code if kernels else {})


@pytest.fixture
def prepared(cubins):
    device, driver, core = recording_device()
    driver.parameter_sizes = NORM_SIZES
    device.prepare([NORM])
    return device, driver, core


# ---- machines -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(has_driver(), reason="there is a driver")
def test_a_machine_without_a_driver_is_told_so_and_what_to_do_in_well_under_a_second():
    began = time.perf_counter()
    with pytest.raises(DeviceUnavailable, match=r"no NVIDIA driver .*580 or later.*--backend cpu"):
        NvidiaDevice()
    assert time.perf_counter() - began < 1


def test_a_machine_without_the_packages_is_told_the_pip_command(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cuda.core", None)
    with pytest.raises(DeviceUnavailable, match=r'pip install "rillet\[cuda\]"'):
        Libraries()


@pytest.mark.parametrize(
    ("answers", "capability", "words"),
    [
        ({"cuInit": bindings.CUresult.CUDA_ERROR_NO_DEVICE}, (9, 0), "CUDA_ERROR_NO_DEVICE.*nvidia-smi"),
        ({"cuDriverGetVersion": 12040}, (9, 0), r"is for CUDA 12\.4, 13\.0 is needed: install a driver"),
        ({"cuDeviceGetCount": 0}, (9, 0), "no GPU 0, there are 0.*CUDA_VISIBLE_DEVICES"),
        ({}, (7, 5), r"compute capability 7\.5, 8\.0 is needed"),
    ],
)
def test_what_a_machine_lacks_is_said_with_the_cure(answers, capability, words):
    with pytest.raises(DeviceUnavailable, match=words):
        recording_device(capability=capability, **answers)


def test_launch_geometry_is_read_off_the_device():
    device, _, _ = recording_device()
    assert device.facts == DeviceFacts("Recording 9000", "sm_90", 132, 227 << 10, 8 << 30)


# ---- launches -----------------------------------------------------------------------------------------------------------


def test_arguments_arrive_as_the_very_bytes_of_their_types(prepared):
    device, driver, _ = prepared
    array = Array(ADDRESS, (3, 64), "f32")
    device.stream().launch(NORM, (3, 1, 1), 256, 160, array, 0, array.row(1), 1 << 47, np.int32(-64), np.float32(1e-6))
    assert driver.launches == [
        [struct.pack("<Q", ADDRESS), bytes(8), struct.pack("<Q", ADDRESS + 256), struct.pack("<Q", 1 << 47),
         struct.pack("<i", -64), struct.pack("<f", 1e-6)],
    ]  # fmt: skip
    _, function, *geometry, shared, stream, _, extra = driver.calls[-1]
    assert (int(function), geometry, shared, int(stream), extra) == (77, [3, 1, 1, 256, 1, 1], 160, 9, 0)


def test_every_scalar_type_keeps_its_value_and_neighbours_do_not_mix(cubins):
    device, driver, _ = recording_device()
    driver.parameter_sizes = [4, 8, 4, 8, 4]
    device.prepare([NORM])
    stream = device.stream()
    for sign in (-1, 1):                      # the second launch packs by the remembered layout
        numbers = np.uint32(0xFFFFFFFF), np.int64(sign * (1 << 40)), np.int32(sign), 0, np.float32(sign / 3)
        stream.launch(NORM, (1, 1, 1), 32, 0, *numbers)
        integers = struct.pack("<q", sign << 40), struct.pack("<i", sign)
        assert driver.launches[-1] == [b"\xff" * 4, *integers, bytes(8), struct.pack("<f", sign / 3)]


def test_a_structure_by_value_arrives_whole_and_aligned(cubins):
    device, driver, _ = recording_device()
    driver.parameter_sizes = [4, 128, 8, 8]
    device.prepare([NORM])
    structure, extents = bytes(range(128)), struct.pack("<2i", 5, 7)
    device.stream().launch(NORM, (1, 1, 1), 32, 0, np.int32(3), structure, extents, ADDRESS)
    assert driver.launches == [[struct.pack("<i", 3), structure, extents, struct.pack("<Q", ADDRESS)]]
    with pytest.raises(StepFailed, match=r"arguments of \[4, 127, 8, 8\] bytes are given, it takes \[4, 128, 8, 8\]"):
        device.stream().launch(NORM, (1, 1, 1), 32, 0, np.int32(3), structure[1:], extents, ADDRESS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, 0, 0, 0, np.int32(1)), r"\[8, 8, 8, 8, 4\] bytes are given, it takes \[8, 8, 8, 8, 4, 4\]"),
        ((0, 0, 0, 0, np.int64(1), np.float32(1)), r"\[8, 8, 8, 8, 8, 4\] bytes are given"),
        ((0, 0, 0, 0, np.int32(1), 1.0), "argument 5 is a float"),
        ((0, 0, 0, 0, np.int32(1), np.float64(1)), "argument 5 is a float64"),
        ((0, 0, 0, -8, np.int32(1), np.float32(1)), "-8"),
    ],
)
def test_arguments_that_a_kernel_does_not_take_are_refused_before_the_launch(prepared, arguments, words):
    device, driver, _ = prepared
    with pytest.raises(StepFailed, match=words):
        device.stream().launch(NORM, (1, 1, 1), 32, 0, *arguments)
    assert driver.launches == []


def test_a_kernel_that_was_not_prepared_is_refused(prepared):
    device, _, _ = prepared
    with pytest.raises(StepFailed, match="some_norm<false> was not prepared"):
        device.stream().launch(Kernel("some.cu", "some_norm<false>"), (1, 1, 1), 32, 0)


def test_more_than_48_kb_of_shared_memory_is_asked_for_once_and_only_then(prepared):
    device, driver, _ = prepared
    arguments = (0, 0, 0, 0, np.int32(1), np.float32(1))
    stream = device.stream()
    for shared in (48 << 10, 99 << 10, 60 << 10):
        stream.launch(NORM, (1, 1, 1), 256, shared, *arguments)
    asked = [call for call in driver.calls if call[0] == "cuFuncSetAttribute"]
    wanted = bindings.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    assert [(int(call[1]), call[2], call[3]) for call in asked] == [(77, wanted, 99 << 10)]


# ---- memory -------------------------------------------------------------------------------------------------------------


def test_memory_that_cannot_be_had_says_how_much_is_free():
    device, _, _ = recording_device(cuMemAlloc=bindings.CUresult.CUDA_ERROR_OUT_OF_MEMORY)
    with pytest.raises(OutOfDeviceMemory, match=r"allocating 9,000,000,000 bytes, 7,516,192,768 are free"):
        device.allocate(9_000_000_000)


def test_copies_name_target_source_and_size_and_empty_ones_are_left_out(prepared):
    device, driver, _ = prepared
    there, stream = device.allocate(1024), device.stream()
    host = device.host_array(64)
    host[:] = 7
    stream.copy_in(there, host)
    stream.copy_out(host[8:24], there + 8)
    stream.copy(there + 512, there, 256)
    stream.fill(there, 100, 255)
    before = len(driver.calls)
    stream.copy_in(there, host[:0])
    stream.copy(there, there, 0)
    assert len(driver.calls) == before
    calls = [call[:-1] for call in driver.calls[-4:]]
    assert calls == [
        ("cuMemcpyHtoDAsync", there, host.ctypes.data, 64),
        ("cuMemcpyDtoHAsync", host.ctypes.data + 8, there + 8, 16),
        ("cuMemcpyDtoDAsync", there + 512, there, 256),
        ("cuMemsetD8Async", there, 255, 100),
    ]


def test_host_memory_outlives_the_device_while_somebody_looks_at_it():
    device, driver, _ = recording_device()
    host = device.host_array(64)
    view = host[3:9].view(np.uint8)
    device.close()
    del host
    gc.collect()
    assert "cuMemFreeHost" not in driver.names()
    del view
    gc.collect()
    assert driver.names().count("cuMemFreeHost") == 1


def test_closing_frees_what_was_not_released_and_may_be_repeated():
    device, driver, _ = recording_device()
    first, second = device.allocate(10), device.allocate(10)
    device.release(first)
    device.close()
    device.close()
    assert [call[1] for call in driver.calls if call[0] == "cuMemFree"] == [first, second]
    with pytest.raises(StepFailed, match="closed"):
        device.allocate(1)


# ---- graphs and errors --------------------------------------------------------------------------------------------------


def test_a_capture_takes_launches_and_copies_on_the_device_and_refuses_the_others(prepared):
    device, _, core = prepared
    stream, host = device.stream(), np.zeros(4, np.uint8)
    graph = stream.capture(lambda: stream.copy(4096, 0, 16))
    stream.replay(graph)
    assert core.log[-5:] == ["begin thread_local", "end", "close builder", "upload", "replay"]
    for refused in (lambda: stream.copy_in(0, host), lambda: stream.copy_out(host, 0), lambda: stream.wait(stream.record())):
        with pytest.raises(StepFailed, match="cannot be captured"):
            stream.capture(refused)
    assert core.log[-2:] == ["end", "close builder"]
    stream.copy_in(0, host)                   # capturing is over


def test_no_garbage_is_collected_while_a_capture_is_under_way(prepared):
    """What a destructor frees in the capturing thread would make the capture invalid."""
    device, _, core = prepared
    stream, seen = device.stream(), []
    stream.capture(lambda: seen.append(gc.isenabled()))
    with pytest.raises(ZeroDivisionError):
        stream.capture(lambda: 1 / 0)
    assert seen == [False]
    assert gc.isenabled()
    assert core.log.count("close builder") == 2


def test_a_capture_that_the_driver_refuses_to_end_says_what_went_wrong_in_it(prepared):
    device, _, core = prepared

    def break_it():
        core.failing = RuntimeError("CUDA_ERROR_STREAM_CAPTURE_INVALIDATED")
        raise StepFailed("the first reason")

    stream = device.stream()
    with pytest.raises(StepFailed, match="the first reason"):
        stream.capture(break_it)
    with pytest.raises(StepFailed, match="STREAM_CAPTURE_INVALIDATED"):
        stream.capture(lambda: None)


def test_a_device_error_is_a_failed_step_and_closing_still_works(prepared):
    device, driver, core = prepared
    stream = device.stream()
    event = stream.record()
    core.failing = RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS: the device encountered a load or store on an invalid address")
    for work in (event.wait, device.synchronize, stream.record):
        with pytest.raises(StepFailed, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
            work()
    driver.answers["cuLaunchKernel"] = bindings.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(StepFailed, match=r"some_norm.*CUDA_ERROR_ILLEGAL_ADDRESS.*start again"):
        stream.launch(NORM, (1, 1, 1), 32, 0, 0, 0, 0, 0, np.int32(1), np.float32(1))
    device.close()


def test_a_tensor_map_is_asked_for_as_tma_wants_it():
    encoded = bindings.CUtensorMap()
    device, driver, _ = recording_device(cuTensorMapEncodeTiled=encoded)
    assert len(device.tensor_map(Array(ADDRESS, (100, 512), "bf16"), (128, 64))) == 128
    _, item, rank, address, extents, strides, box, steps, *_ = driver.calls[-1]
    assert item == bindings.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
    numbers = [[int(each) for each in each_list] for each_list in (extents, strides, box, steps)]
    assert (rank, address, numbers) == (2, ADDRESS, [[512, 100], [1024], [64, 128], [1, 1]])
