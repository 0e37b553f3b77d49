"""The product in CuTe DSL: without a GPU it compiles to what was meant; ci/device sees on one if its numbers are right."""

import re

import pytest

from backends.cuda.cubins import KERNELS
from backends.cuda.elf import resources_of

pytest.importorskip("nvidia_cutlass_dsl")
from backends.cuda.bundle import Bundle, write_bundle
from backends.cuda.compile import CUTLASS, compile_with_cutlass
from backends.cuda.cutlass_kernels import dense_gemm, offline

TENSOR_MAP, EXTENTS, POINTER, INT = 128, 8, 8, 4


@pytest.fixture(scope="module")
def compiled():
    """One of each design."""
    return {target: dense_gemm.compile(target) for target in ("sm_80", "sm_90a")}


def test_hopper_gets_tensor_maps_by_value_and_ampere_pointers_alone(compiled):
    assert compiled["sm_90a"].launch["parameters"] == [TENSOR_MAP, EXTENTS, TENSOR_MAP, EXTENTS, POINTER, INT, INT, INT]
    assert compiled["sm_80"].launch["parameters"] == [POINTER, POINTER, POINTER, INT, INT, INT]


@pytest.mark.parametrize(("target", "limit"), [("sm_80", 99 << 10), ("sm_90a", 227 << 10)])
def test_stages_fit_a_block_and_sums_fit_its_registers(compiled, target, limit):
    code, launch = compiled[target].code, compiled[target].launch
    rows, columns, depth = launch["tile"]
    stages = 4
    tiles = stages * (rows + columns) * depth * 2
    assert tiles <= launch["shared_bytes"] <= min(limit, tiles + 2048)
    registers, stack = resources_of(code)[compiled[target].symbol]
    assert stack == 0
    warpgroups = -(-launch["threads"] // 128)
    assert registers * 128 * warpgroups <= 65536


@pytest.mark.parametrize(
    ("target", "wanted", "unwanted"),
    [
        ("sm_90a", {r"wgmma\.mma_async.*m64n256k16.*bf16": 4, r"cp\.async\.bulk\.tensor\.2d": 2}, [r"\bmma\.sync"]),
        ("sm_80", {r"mma\.sync\.aligned\.m16n8k16.*bf16": 32, r"ldmatrix.*x4": 12, r"cp\.async\.cg.*16": 4}, ["wgmma"]),
    ],
)
def test_the_instructions_are_those_of_the_architecture(monkeypatch, target, wanted, unwanted):
    seen = []
    monkeypatch.setattr(offline, "parameter_bytes", lambda ptx: seen.append(ptx) or [])
    dense_gemm.compile(target)
    (ptx,) = seen
    for pattern, least in wanted.items():
        assert len(re.findall(pattern, ptx)) >= least, pattern
    for pattern in unwanted:
        assert not re.search(pattern, ptx), pattern


def test_it_is_part_of_a_bundle_and_its_launch_facts_with_it(tmp_path):
    (kernel,) = CUTLASS
    made = compile_with_cutlass(kernel.file, "sm_90a")
    write_bundle(tmp_path, {(kernel.file, "sm_90a"): made}, "CuTe DSL")
    found = Bundle(tmp_path).get(kernel.file, [kernel], "sm_90a")
    assert found == made
    assert found.kernels[kernel.name].launch["boxes"] == {"A": [128, 64], "B": [256, 64]}


def test_nothing_launches_it_yet():
    backend = KERNELS.parent
    callers = [path.name for path in backend.glob("*.py") if "dense_gemm" in path.read_text()]
    assert callers == ["compile.py"]


@pytest.mark.full
@pytest.mark.parametrize("target", dense_gemm.TARGETS)
def test_it_compiles_for_every_architecture_that_it_is_for(target):
    made = dense_gemm.compile(target)
    assert resources_of(made.code)[made.symbol][1] == 0
