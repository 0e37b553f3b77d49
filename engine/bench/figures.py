"""Figure: one measured number with its settings, what it is held against, and the two ways of showing many of them."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from rich.table import Table

__all__ = ["Figure", "table", "write_json"]


@dataclass(frozen=True, slots=True)
class Figure:
    """limit: what the machine allows, peer: what another engine reached in the same run, both in `unit`."""

    name: str
    value: float
    unit: str
    settings: str
    goal: str = ""
    limit: float | None = None
    peer: float | None = None

    @property
    def of_limit(self) -> str:
        return f"{self.value / self.limit:.0%}" if self.limit else ""

    @property
    def times_peer(self) -> str:
        return f"{self.value / self.peer:.2f} x" if self.peer else ""


def table(figures: Sequence[Figure], title: str) -> Table:
    """A table for a terminal; columns that no figure fills are left out."""
    shown = Table(title=title)
    columns = {
        "figure": [figure.name for figure in figures],
        "value": [f"{figure.value:,.2f} {figure.unit}" for figure in figures],
        "of the limit": [figure.of_limit for figure in figures],
        "to the peer": [figure.times_peer for figure in figures],
        "goal": [figure.goal for figure in figures],
        "settings": [figure.settings for figure in figures],
    }
    kept = {name: cells for name, cells in columns.items() if any(cells)}
    for name in kept:
        shown.add_column(name)
    for row in zip(*kept.values(), strict=True):
        shown.add_row(*row)
    return shown


def write_json(path: Path, figures: Sequence[Figure], more: Mapping[str, object]) -> None:
    """`more`: what else belongs to the settings of the run."""
    about = {
        "rillet": version("rillet"), "when": datetime.now(UTC).isoformat(timespec="seconds"), "machine": platform.machine(),
        "processor": processor(), "system": platform.system(), "cores": os.cpu_count(), **more,
    }  # fmt: skip
    content = {"machine": about, "figures": [asdict(figure) for figure in figures]}
    path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def processor() -> str:
    """What the processor calls itself, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
