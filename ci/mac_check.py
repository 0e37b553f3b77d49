"""python ci/mac_check.py [all|quick|numerics]: what ci/device runs on a Mac; docs/mac.md has the environment variables.

Numerics: tests/mlx with every Metal kernel on Metal. Then engine.bench with the mlx backend, a process for each row, and
mlx-lm and llama.cpp row by row beside it where they are installed. The table, also written as markdown, has the bytes that a
token costs and what share of the memory bandwidth they take; a copy through MLX in the same run measures that.
Exit code 1 if anything of ours failed, or if there is no Metal (--tiny: sizes for any machine, tests have it).
"""

import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter

from engine.bench.figures import processor
from engine.bench.synthetic import MODELS as SHAPES
from engine.bench.synthetic import synthetic_checkpoint
from engine.bench.workloads import Workload, workload
from engine.weights.checkpoint import Checkpoint, open_checkpoint

PROJECT = Path(__file__).resolve().parent.parent
WIDE = os.environ | {"COLUMNS": "1000"}       # or a message is cut into lines
ROW_S, NUMERICS_S = 1800, 3600
ROUNDS = 3                                   # of the short rows, of which the median counts; the long ones are run once
TOGETHER = 128                               # sequences in one step, of VR and NV256


@dataclass(frozen=True, slots=True)
class Model:
    """What is measured: a real file if `variable` names one, else random weights in its shape."""

    name: str
    synthetic: str
    variable: str                            # the path for us and llama.cpp; with _MLX behind it that for mlx-lm
    rows: tuple[str, ...]
    bits: int | None                         # of mlx-lm's quantization that is nearest

    @property
    def path(self) -> str | None:
        return os.environ.get(self.variable) or None


@dataclass(frozen=True, slots=True)
class Goal:
    """Tokens per second on a base M4: what this project wants, and what vllm.rs had."""

    wanted: float
    vllm_rs: float


MODELS = (
    Model("Qwen3-0.6B BF16", "qwen3-0.6b:bf16", "RILLET_QWEN3_06B", ("B1", "PRE", "VR", "NV256"), None),
    Model("Qwen3-4B Q4_K_M", "qwen3-4b:q4_k_m", "RILLET_QWEN3_4B", ("B1", "PRE", "VR", "NV256"), 4),
    Model("Qwen3-8B Q2_K", "qwen3-8b:q2_k", "RILLET_QWEN3_8B", ("B1",), 2),
)
GOALS = {
    ("qwen3-0.6b:bf16", "B1"): Goal(75, 49),
    ("qwen3-0.6b:bf16", "VR"): Goal(1500, 764),
    ("qwen3-4b:q4_k_m", "B1"): Goal(40, 32),
    ("qwen3-8b:q2_k", "B1"): Goal(26, 16),
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    copied_bytes: int = 1 << 30
    matrix: int = 4096
    scale: float = 1.0                       # of the lengths of VR and NV256
    sequences: tuple[int, int] = (TOGETHER, 256)
    rounds: int = ROUNDS
    together: int = TOGETHER


TINY = Sizes(1 << 22, 64, 0.01, (3, 4), 1, 4)


@dataclass(frozen=True, slots=True)
class Limits:
    """Of the device, through MLX: bytes per second that a copy reads and writes, multiply-adds per second of a product."""

    device: str
    bandwidth: float
    multiply_adds: float


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table, rates in tokens per second. peers: by name, a rate or why there is none."""

    model: str
    row: str
    settings: str
    rate: float | None
    bytes_per_token: float
    of_limit: float | None = None            # of the bench's own limit: bandwidth for one stream, else multiply-adds
    goal: Goal | None = None
    peers: tuple[tuple[str, float | str], ...] = ()


HEADS = ("model", "row", "tok/s", "goal (M4)", "vllm.rs (M4)", "MB/token", "GB/s", "of bandwidth", "of limit")


# ---- the table ----------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row], limits: Limits) -> list[list[str]]:
    """Cells, the headings first. Columns of peers are there if any row has them."""
    peers = list(dict.fromkeys(name for row in rows for name, _ in row.peers))
    lines = [[*HEADS, *peers, "settings"]]
    for row in rows:
        rate = row.rate
        used = rate * row.bytes_per_token if rate else None
        others = dict(row.peers)
        lines.append([
            row.model, row.row, number(rate) if rate else "FAILED",
            number(row.goal.wanted) if row.goal else "", number(row.goal.vllm_rs) if row.goal else "",
            number(row.bytes_per_token / 1e6), number(used / 1e9) if used else "",
            f"{used / limits.bandwidth:.0%}" if used else "", f"{row.of_limit:.0%}" if row.of_limit else "",
            *(beside(others.get(name, ""), rate) for name in peers), row.settings,
        ])  # fmt: skip
    return lines


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def beside(peer: float | str, rate: float | None) -> str:
    """A peer's rate, and ours as so many of it; or why there is none."""
    if isinstance(peer, str):
        return peer
    return f"{number(peer)} ({rate / peer:.2f} x)" if rate else number(peer)


def as_text(cells: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in cells)
    return "\n".join("  ".join(line).rstrip() for line in padded)


def as_markdown(cells: list[list[str]], about: Sequence[str]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in cells]
    rule = "|" + "---|" * len(cells[0])
    return "\n".join(["# sh ci/device on a Mac", *(f"- {line}" for line in about), "", lines[0], rule, *lines[1:], ""])


# ---- bytes --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of a model: its weights as the file has them, without an embedding that only gives rows; a token's K and V."""

    weights: int
    cache: int

    @classmethod
    def of(cls, checkpoint: Checkpoint, cache_item: int = 2) -> "Traffic":
        names = set(checkpoint.tensors.names())
        left_out = {"embedding"} if "output" in names else set()
        weights = sum(checkpoint.tensors.tensor(name).data.nbytes for name in names - left_out)
        heads = (layer.attention for layer in checkpoint.spec.layers)
        return cls(weights, sum(2 * a.kv_heads * a.head_size * cache_item for a in heads))

    def per_token(self, work: Workload, places: int) -> float:
        """The least that must move for one token: a step's weights are shared by the rows that fit into it."""
        if work.about == "prompt":
            return self.weights / max(map(len, work.prompts)) + self.cache
        context = sum(
            answer * (len(prompt) + (answer - 1) / 2) for prompt, answer in zip(work.prompts, work.answers, strict=True)
        ) / sum(work.answers)
        return self.weights / min(len(work.prompts), places) + self.cache * (context + 1)


# ---- running ------------------------------------------------------------------------------------------------------------


def numerics() -> bool:
    """tests/mlx with the kernels on Metal; whether all pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not full", "tests/mlx"]
    print("==", "RILLET_METAL=native", " ".join(command[1:]), flush=True)
    environment = os.environ | {"RILLET_METAL": "native"}
    try:
        return subprocess.run(command, cwd=PROJECT, env=environment, timeout=NUMERICS_S).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"FAILED: it took more than {NUMERICS_S} s")
        return False


def measure_limits(sizes: Sizes) -> Limits:
    """Runs in a process of its own: --limits."""
    import mlx.core as mx

    def seconds(work: Callable[[], object], again: int = 7) -> float:
        times = []
        for _ in range(again + 1):
            began = perf_counter()
            mx.eval(work())
            times.append(perf_counter() - began)
        return statistics.median(times[1:])

    source, one = mx.random.normal((sizes.copied_bytes // 4,)), mx.array(1.0)
    mx.eval(source, one)
    copied = seconds(lambda: source + one)                   # MLX has no plain copy; it reads and writes as one does
    item = mx.bfloat16 if mx.metal.is_available() else mx.float32
    a = mx.random.normal((sizes.matrix, sizes.matrix)).astype(item)
    mx.eval(a)
    product = seconds(lambda: a @ a)
    device = str(mx.device_info().get("device_name", "")) if mx.metal.is_available() else f"no Metal, {processor()}"
    return Limits(device, 2 * sizes.copied_bytes / copied, sizes.matrix**3 / product)


def limits_of(tiny: bool) -> Limits:
    command = [sys.executable, str(Path(__file__)), "--limits", *(["--tiny"] if tiny else [])]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True, timeout=300)
    return Limits(**json.loads(done.stdout.splitlines()[-1]))


def work_of(row: str, sizes: Sizes) -> Workload:
    name, sequences = ("VR256", sizes.sequences[0]) if row == "VR" else (row, sizes.sequences[1])
    return workload(name, sequences, sizes.scale)


def our_rate(model: Model, row: str, sizes: Sizes, limits: Limits, *more: str) -> tuple[float, float | None, float | None]:
    """(rate, the bench's limit, the rate of the peer that `more` names). Raises RuntimeError with what went wrong."""
    work = work_of(row, sizes)
    named = ["--f" if Path(model.path).is_file() else "--w", model.path] if model.path else ["--synthetic", model.synthetic]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "figures.json"
        command = [
            sys.executable, "-m", "engine.bench", "--backend", "mlx", "--rows", work.name, "--json", str(target),
            "--bandwidth", f"{limits.bandwidth / 1e9:.3f}", "--multiply-adds", f"{limits.multiply_adds / 1e9:.3f}",
            "--sequences", str(len(work.prompts) if len(work.prompts) > 1 else 1), "--scale", str(sizes.scale),
            "--max-num-seqs", str(sizes.together), "--kv-fraction", "0.8", "--rounds", str(rounds_of(row, sizes)),
            *named, *more,
        ]  # fmt: skip
        print("==", " ".join(command[1:]), flush=True)
        try:
            done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=ROW_S, env=WIDE)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"it took more than {ROW_S} s") from None
        if done.returncode or not target.exists():
            lines = (done.stdout.strip() + "\n" + done.stderr.strip()).strip().splitlines()
            raise RuntimeError(lines[-1].removeprefix("rillet bench: ") if lines else f"it ended with {done.returncode}")
        (figure,) = json.loads(target.read_text())["figures"]
    return figure["value"], figure["limit"], figure["peer"]


def rounds_of(row: str, sizes: Sizes) -> int:
    return 1 if row in ("VR", "NV256") else sizes.rounds


def llama_cpp(model: Model, work: Workload) -> list[str]:
    """The bench's flags for it; none if it is not installed or cannot run this."""
    if model.path is None or not model.path.endswith(".gguf"):
        return []
    if program := shutil.which("llama-batched-bench"):
        equal = len(set(map(len, work.prompts))) == len(set(work.answers)) == 1
        return ["--peer", program] if equal else []
    python = os.environ.get("LLAMA_CPP_PYTHON")
    if python or importlib.util.find_spec("llama_cpp"):
        return ["--peer", "llama.cpp", "--peer-python", python or sys.executable]
    return []


def mlx_lm(model: Model, row: str, sizes: Sizes) -> float | str | None:
    """Its rate, why there is none, or None if it is not installed."""
    python = os.environ.get("MLX_LM_PYTHON") or (sys.executable if importlib.util.find_spec("mlx_lm") else None)
    if python is None:
        return None
    folder = os.environ.get(model.variable + "_MLX")
    if folder is None and model.path and Path(model.path).is_dir():
        folder = model.path
    work = work_of(row, sizes)
    seeds = [work if row == "VR" else work.with_seed(turn) for turn in range(rounds_of(row, sizes))]
    asked = "".join(json.dumps({"prompts": one.prompts, "answers": one.answers}) + "\n" for one in seeds)
    command = [python, str(PROJECT / "ci" / "mac_peer.py"), folder or json.dumps(mlx_lm_model(model))]
    try:
        done = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=ROW_S)
        answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return f"failed: {error}"[:60]
    if done.returncode or len(answers) != 1 + len(seeds):
        said = done.stderr.strip().splitlines()
        return f"failed: {said[-1] if said else done.returncode}"[:60]
    return statistics.median(answer[work.about] for answer in answers[1:])


def mlx_lm_model(model: Model) -> dict[str, object]:
    """mlx-lm's own model of the same shape, of random weights."""
    shape = SHAPES[model.synthetic.partition(":")[0]]
    config = {
        "model_type": "qwen3", "hidden_size": shape.hidden, "num_hidden_layers": shape.layers, "rms_norm_eps": 1e-6,
        "intermediate_size": shape.feed_forward.width, "num_attention_heads": shape.heads, "head_dim": shape.head_size,
        "vocab_size": shape.vocabulary, "num_key_value_heads": shape.kv_heads, "max_position_embeddings": 32768,
        "tie_word_embeddings": shape.tied, "rope_theta": shape.theta,
    }  # fmt: skip
    return {"config": config, "bits": model.bits}


def measure(model: Model, sizes: Sizes, limits: Limits, cache_item: int) -> list[Row]:
    """All rows of a model; one that fails has no rate."""
    checkpoint = open_checkpoint(Path(model.path)) if model.path else synthetic_checkpoint(model.synthetic)
    traffic = Traffic.of(checkpoint, cache_item)
    checkpoint.close()
    rows = []
    for name in model.rows:
        work = work_of(name, sizes)
        row = Row(model.name if model.path else f"{model.name}, random weights", name, work.settings, None,
                  traffic.per_token(work, sizes.together), goal=GOALS.get((model.synthetic, name)))  # fmt: skip
        peers: list[tuple[str, float | str]] = []
        if (other := mlx_lm(model, name, sizes)) is not None:
            peers.append(("mlx-lm", other))
        flags = llama_cpp(model, work)
        try:
            try:
                rate, limit, peer = our_rate(model, name, sizes, limits, *flags)
            except RuntimeError as error:
                if not flags:
                    raise
                peers.append(("llama.cpp", f"failed: {error}"[:60]))      # or ours did: once more without it
                rate, limit, peer = our_rate(model, name, sizes, limits)
            row = replace(row, rate=rate, of_limit=rate / limit if limit else None)
            if peer:
                peers.append(("llama.cpp", peer))
        except RuntimeError as error:
            print(f"FAILED: {model.name} {name}: {error}", flush=True)
        rows.append(replace(row, peers=tuple(peers)))
    return rows


def system() -> str:
    """Chip, memory and macOS, as far as they tell."""
    said = []
    for command in ("sysctl -n machdep.cpu.brand_string", "sysctl -n hw.memsize", "sw_vers -productVersion"):
        try:
            done = subprocess.run(command.split(), capture_output=True, text=True, timeout=10)
            said.append(done.stdout.strip() if done.returncode == 0 else "")
        except OSError:
            said.append("")
    chip, memory, version = said
    gigabytes = f"{int(memory) / 2**30:.0f} GiB" if memory.isdigit() else ""
    return ", ".join(filter(None, [chip or processor(), gigabytes, f"macOS {version}" if version else sys.platform]))


def main(arguments: Sequence[str]) -> int:
    tiny = "--tiny" in arguments
    sizes = TINY if tiny else Sizes()
    if "--limits" in arguments:
        print(json.dumps(asdict(measure_limits(sizes))))
        return 0
    ring = next((one for one in arguments if not one.startswith("-")), "all")
    import mlx.core as mx

    native = mx.metal.is_available()
    if not (native or tiny):
        print("ci/device on a Mac needs MLX with Metal: pip install mlx on Apple silicon", file=sys.stderr)
        return 1
    right = True
    if ring != "quick" and not tiny:
        right = numerics()
    if ring != "numerics":
        limits = limits_of(tiny)
        measured = [row for model in MODELS if not tiny or model.path for row in
                    measure(model, sizes, limits, 2 if native else 4)]  # fmt: skip
        right &= all(row.rate is not None for row in measured)
        cells = table(measured, limits)
        about = [
            f"{system()}; MLX {mx.__version__} on {limits.device}; {datetime.now(UTC):%Y-%m-%d}",
            f"through MLX: {limits.bandwidth / 1e9:.1f} GB/s in a copy, {limits.multiply_adds / 1e9:,.0f} G multiply-adds/s",
            "goals and vllm.rs: tokens/s on a base M4 (120 GB/s); another chip is judged by its share of the bandwidth",
        ]
        print("\n" + "\n".join(about) + "\n\n" + as_text(cells))
        target = Path(os.environ.get("RILLET_MAC_TABLE") or "mac-table.md")
        target.write_text(as_markdown(cells, about), "utf-8")
        print(f"\nalso in {target}")
    print("everything passed" if right else "FAILED: see above")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
