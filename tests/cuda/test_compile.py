"""Kernels to machine code: the compiler, the cache, bundles, the command. No GPU is needed."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed: pip install rillet[cuda]")

from backends.cuda import catalogue, cubins, nvrtc
from backends.cuda import compile as compiling
from backends.cuda.bundle import Bundle, write_bundle
from backends.cuda.catalogue import all_kernels
from backends.cuda.compile import ARCHITECTURES, by_file, candidates, find_cubins, main, side_by_side
from backends.cuda.cubins import CubinCache
from backends.cuda.device import Kernel
from backends.cuda.elf import resources_of
from backends.cuda.nvrtc import compile_file
from engine.errors import DeviceUnavailable

SOURCE = """
#include "twice.cuh"
template <int N> __global__ void scale(float* x, float factor) {
    float local[N];
    for (int i = 0; i < N; ++i) local[i] = x[threadIdx.x * N + i];
    for (int i = 0; i < N; ++i) x[threadIdx.x * N + i] = twice(local[(i + 1) % N]) * factor;
}
template <int N> __global__ void indexed(float* x, int at) {
    float local[N];
    for (int i = 0; i < N; ++i) local[i] = x[i];
    local[at] = 1.0f;
    for (int i = 0; i < N; ++i) x[i] = local[i] + local[(i + at) % N];
}
"""
HEADER = "__device__ inline float twice(float x) { return 2.0f * x; }\n"
SCALE = Kernel("probe.cu", "scale<4>")
HOT = {"product_few.cu", "product_many.cu", "attention_decode.cu", "attention_prefill.cu", "norm.cu", "gated.cu"}
OFTEN = re.compile(
    r"attend_\w+<128|product_few<(Q4_K|Q6_K|BF16), f|product_many<(Q4_K|BF16), f\w+, (16|96)|norm_rows.* 4>|gated<SILU, 8>"
)


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A folder of kernels of the test's own, and a cache of its own."""
    folder = tmp_path / "kernels"
    folder.mkdir()
    (folder / "probe.cu").write_text(SOURCE)
    (folder / "twice.cuh").write_text(HEADER)
    for module in (cubins, nvrtc):
        monkeypatch.setattr(module, "KERNELS", folder)
    monkeypatch.setenv("RILLET_CUDA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RILLET_CUDA_BUNDLE", raising=False)
    cubins.source_hash.cache_clear()
    yield folder
    cubins.source_hash.cache_clear()


@pytest.fixture
def compilations(monkeypatch):
    """The (file, names, target) of every run of the compiler."""
    runs = []

    def counted(file, names, target):
        runs.append((file, tuple(names), target))
        return compile_file(file, names, target)

    monkeypatch.setattr(compiling, "compile_file", counted)
    return runs


def change(path, before, after):
    path.write_text(path.read_text().replace(before, after))
    cubins.source_hash.cache_clear()


def cache_entry():
    (entry,) = cubins.cache_folder().glob("*.cubin")
    return entry


# ---- the compiler -------------------------------------------------------------------------------------------------------


def test_instantiations_of_a_file_share_one_cubin_and_keep_their_names(sources):
    cubin = compile_file("probe.cu", ["scale<4>", "scale<8>"], "sm_90a")
    assert cubin.code[:4] == b"\x7fELF"
    assert set(cubin.kernels) == {"scale<4>", "scale<8>"}
    symbols = {facts.symbol for facts in cubin.kernels.values()}
    assert len(symbols) == 2
    assert all(symbol.encode() in cubin.code for symbol in symbols)


def test_registers_and_stack_are_reported_as_the_cubin_itself_has_them(sources):
    cubin = compile_file("probe.cu", ["scale<4>", "indexed<64>"], "sm_80")
    itself = resources_of(cubin.code)
    for facts in cubin.kernels.values():
        assert (facts.registers, facts.stack_bytes) == itself[facts.symbol]
    assert cubin.kernels["scale<4>"].stack_bytes == 0
    assert cubin.kernels["indexed<64>"].stack_bytes == 256


@pytest.mark.parametrize(
    ("before", "after", "names", "words"),
    [
        ("twice(", "thrice(", ["scale<4>"], r'for sm_90a by NVRTC \d+\.\d+:\n.*"thrice" is undefined'),
        ("", "", ["scael<4>"], 'cannot be compiled.*\n.*"scael" is undefined'),
        ('#include "twice.cuh"', '#include "thrice.cuh"', ["scale<4>"], "thrice.cuh"),
    ],
)
def test_what_the_compiler_refuses_is_said_in_its_own_first_lines(sources, before, after, names, words):
    change(sources / "probe.cu", before, after)
    with pytest.raises(DeviceUnavailable, match=words) as caught:
        compile_file("probe.cu", names, "sm_90a")
    assert len(str(caught.value).splitlines()) <= 8


def test_no_elf_file_is_taken_for_a_cubin():
    cubin = b"\x7fELF" + bytes(200)
    for content in (b"", b"MZ" + bytes(80), cubin, cubin[:30]):
        with pytest.raises(ValueError, match="no cubin"):
            resources_of(content)


def test_a_device_runs_its_own_code_or_that_of_lower_ones_of_its_generation():
    assert candidates("sm_90") == ("sm_90a", "sm_90")
    assert candidates("sm_89")[0] == "sm_89"
    assert "sm_80" in candidates("sm_86")
    assert candidates("sm_121") == ("sm_121", "sm_120")


# ---- the cache ----------------------------------------------------------------------------------------------------------


def test_what_was_compiled_once_is_taken_from_disk(sources, compilations):
    first = find_cubins([SCALE], "sm_90")
    assert find_cubins([SCALE], "sm_90") == first
    assert compilations == [("probe.cu", ("scale<4>",), "sm_90a")]
    assert cache_entry().stat().st_mode & 0o777 == 0o600
    assert cubins.cache_folder().stat().st_mode & 0o777 == 0o700


def test_another_text_header_name_architecture_or_compiler_is_another_entry(sources, compilations, monkeypatch):
    find_cubins([SCALE], "sm_90")
    changes = [
        lambda: change(sources / "probe.cu", "factor;", "factor + 1;"),
        lambda: change(sources / "twice.cuh", "2.0f", "4.0f"),
    ]
    for make in changes:
        make()
        find_cubins([SCALE], "sm_90")
    find_cubins([Kernel("probe.cu", "scale<8>")], "sm_90")
    find_cubins([SCALE], "sm_80")
    monkeypatch.setattr(compiling, "compiler_version", lambda: "NVRTC 99.0")
    find_cubins([SCALE], "sm_90")
    assert len(compilations) == len(list(cubins.cache_folder().glob("*.cubin"))) == 6


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text", "foreign folder", "foreign file", "link"])
def test_a_damaged_or_foreign_entry_is_compiled_anew(sources, compilations, caplog, damage):
    first = find_cubins([SCALE], "sm_90")
    entry = cache_entry()
    content = entry.read_bytes()
    match damage:
        case "cut":
            entry.write_bytes(content[:-1])
        case "flipped":
            entry.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        case "empty":
            entry.write_bytes(b"")
        case "text":
            entry.write_text("not a cubin at all")
        case "foreign folder":
            entry.parent.chmod(0o777)
        case "foreign file":
            entry.chmod(0o666)
        case "link":
            elsewhere = entry.parent.parent / "elsewhere"
            shutil.move(entry, elsewhere)
            entry.symlink_to(elsewhere)
    assert find_cubins([SCALE], "sm_90") == first
    assert len(compilations) == 2
    assert caplog.text.count("WARNING") == (damage != "link")


@pytest.mark.skipif(os.geteuid() != 0 if hasattr(os, "geteuid") else True, reason="only root can give files away")
def test_entries_of_another_owner_are_not_used(sources, compilations):
    find_cubins([SCALE], "sm_90")
    os.chown(cache_entry(), 12345, 12345)
    find_cubins([SCALE], "sm_90")
    assert len(compilations) == 2


def test_a_cache_that_cannot_be_written_costs_a_log_line_and_nothing_else(sources, monkeypatch, caplog, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RILLET_CUDA_CACHE", str(tmp_path / "file" / "cache"))
    assert find_cubins([SCALE], "sm_90")["probe.cu"].has(["scale<4>"])
    assert "set RILLET_CUDA_CACHE" in caplog.text


def test_half_written_entries_are_never_seen(sources, monkeypatch):
    cubin = compile_file("probe.cu", ["scale<4>"], "sm_80")
    monkeypatch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    cache = CubinCache()
    cache.put("key", cubin)
    assert cache.get("key") is None
    assert list(cubins.cache_folder().iterdir()) == []


# ---- bundles ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bundle(sources, tmp_path, monkeypatch):
    folder = tmp_path / "bundle"
    write_bundle(folder, {("probe.cu", "sm_80"): compile_file("probe.cu", ["scale<4>", "scale<8>"], "sm_80")}, "NVRTC 1.2")
    monkeypatch.setenv("RILLET_CUDA_BUNDLE", str(folder))
    return folder


def without_compiler(monkeypatch):
    def refuse():
        raise DeviceUnavailable("no compiler for kernels")

    monkeypatch.setattr(compiling, "supported_targets", refuse)


def test_a_machine_without_a_compiler_runs_from_a_bundle_of_its_generation(bundle, monkeypatch):
    without_compiler(monkeypatch)
    assert find_cubins([SCALE], "sm_86")["probe.cu"].kernels["scale<4>"].registers > 0


@pytest.mark.parametrize(
    ("kernel", "architecture", "words"),
    [
        (Kernel("probe.cu", "scale<16>"), "sm_80", "bundle has no scale<16> for sm_80; no compiler"),
        (SCALE, "sm_90", "bundle has no probe.cu for sm_90a; no compiler"),
    ],
)
def test_what_a_bundle_lacks_is_said_where_there_is_no_compiler(bundle, monkeypatch, kernel, architecture, words):
    without_compiler(monkeypatch)
    with pytest.raises(DeviceUnavailable, match=words):
        find_cubins([kernel], architecture)


def test_where_there_is_a_compiler_it_makes_what_the_bundle_lacks(bundle, compilations):
    find_cubins([SCALE], "sm_80")
    assert compilations == []
    find_cubins([SCALE], "sm_90")
    assert compilations == [("probe.cu", ("scale<4>",), "sm_90a")]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("other source", "was made from another probe.cu"), ("flipped code", "checksum"), ("no manifest", "No such file"),
        ("no json", "cannot be used"), ("other format", "format 1"), ("outside", "not in the folder"),
        ("no symbol", "no symbol"),
    ],
)  # fmt: skip
def test_a_bundle_that_does_not_fit_is_left_aside_with_the_reason(bundle, sources, damage, words, caplog):
    manifest = bundle / "manifest.json"
    text = manifest.read_text()
    match damage:
        case "other source":
            change(sources / "twice.cuh", "2.0f", "3.0f")
        case "flipped code":
            path = bundle / "probe.sm_80.cubin"
            path.write_bytes(path.read_bytes()[:-1] + b"?")
        case "no manifest":
            manifest.unlink()
        case "no json":
            manifest.write_text(text[:-20])
        case "other format":
            manifest.write_text(text.replace('"format": 1', '"format": 2'))
        case "outside":
            manifest.write_text(text.replace('"probe.sm_80.cubin"', '"../probe.sm_80.cubin"'))
        case "no symbol":
            manifest.write_text(text.replace('"symbol"', '"name"'))
    opened = Bundle(bundle)
    assert opened.get("probe.cu", [SCALE], "sm_80") is None
    assert words in opened.refusal
    assert words in caplog.text


def test_the_command_writes_a_bundle_and_a_report(sources, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(catalogue, "all_kernels", lambda: (SCALE, Kernel("probe.cu", "indexed<64>")))
    monkeypatch.setattr(compiling, "has_cutlass", lambda: False)
    assert main(["--arch", "sm_80", "--arch", "sm_90a", "--out", str(tmp_path / "out"), "--report"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"sm_80 +probe.cu +\d+ +0 +256 +\d+  indexed<64>", said)
    assert "4 kernels in 2 cubins" in said
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    made = [(entry["file"], entry["architecture"]) for entry in manifest["cubins"]]
    assert made == [("probe.cu", "sm_80"), ("probe.cu", "sm_90a")]
    change(sources / "probe.cu", "twice(", "thrice(")
    assert main(["--arch", "sm_80", "--report"]) == 1
    assert "thrice" in capsys.readouterr().err


# ---- Rillet's kernels ---------------------------------------------------------------------------------------------------


def spilling(compiled, most_bytes=0):
    return [f"{target} {file} {name}: {facts.stack_bytes} bytes" for (file, target), cubin in compiled.items()
            for name, facts in cubin.kernels.items() if facts.stack_bytes > most_bytes]  # fmt: skip


def test_every_file_of_kernels_is_asked_for_by_somebody():
    assert {path.name for path in cubins.KERNELS.glob("*.cu")} == {kernel.file for kernel in all_kernels()}


def test_the_hot_kernels_compile_for_hopper_and_keep_to_registers():
    wanted = by_file(kernel for kernel in all_kernels() if OFTEN.match(kernel.name))
    assert set(wanted) == HOT
    built = side_by_side(lambda file: compile_file(file, [kernel.name for kernel in wanted[file]], "sm_90a"), list(wanted))
    assert spilling({(file, "sm_90a"): cubin for file, cubin in zip(wanted, built, strict=True)}) == []


A_FEW = 32      # bytes of stack: some storage types and head sizes keep a few registers there, on other machines than Hopper


@pytest.mark.full
@pytest.mark.parametrize("target", ARCHITECTURES)
def test_every_kernel_compiles_for_every_architecture(target):
    for file, kernels in by_file(all_kernels()).items():
        cubin = compile_file(file, [kernel.name for kernel in kernels], target)
        if file in HOT:
            assert spilling({(file, target): cubin}, 0 if target == "sm_90a" else A_FEW) == []
