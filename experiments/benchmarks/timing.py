"""Paired timing: two sides take turns, so the noise of the machine hits both, and only their ratio is reported."""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jcompress as jc

Side = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison. ``ratio`` is the median of the paired ``right / left``; ``low`` and ``high``, its quartiles.

    ``left_s`` and ``right_s`` are medians in seconds, each with the quartiles of its times beside it.
    """

    name: str
    left: str
    right: str
    left_s: float
    left_quartiles: tuple[float, float]
    right_s: float
    right_quartiles: tuple[float, float]
    ratio: float
    low: float
    high: float
    pairs: int
    target: str = ""
    met: bool | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


def seconds(side: Side) -> float:
    start = time.perf_counter()
    jax.block_until_ready(side())
    return time.perf_counter() - start


def paired(left: Side, right: Side, pairs: int, inner: tuple[int, int] = (1, 1)) -> tuple[np.ndarray, np.ndarray]:
    """Times of ``left`` and ``right`` taken in turns, each the mean of ``inner`` calls, after two calls to warm up.

    The side that goes first changes from pair to pair.
    """
    sides = (left, right)
    for side in (*sides, *sides):
        seconds(side)
    times = np.zeros((2, pairs))
    for pair in range(pairs):
        for i in (0, 1) if pair % 2 == 0 else (1, 0):
            times[i, pair] = np.mean([seconds(sides[i]) for _ in range(inner[i])])
    return times[0], times[1]


def row(name: str, left: tuple[str, np.ndarray], right: tuple[str, np.ndarray], target: str = "", **extra: Any) -> Row:
    """The comparison of two series of paired times. ``target`` is ``">= x"`` or ``"<= x"`` for the ratio."""
    a, b = left[1], right[1]
    ratios = b / a
    ratio, low, high = (float(x) for x in np.percentile(ratios, [50, 25, 75]))
    return Row(
        name, left[0], right[0],
        float(np.median(a)), _quartiles(a), float(np.median(b)), _quartiles(b),
        ratio, low, high, len(a), target, is_met(ratio, target), extra,
    )  # fmt: skip


def _quartiles(x: np.ndarray) -> tuple[float, float]:
    return float(np.percentile(x, 25)), float(np.percentile(x, 75))


def is_met(value: float, target: str) -> bool | None:
    if not target:
        return None
    sign, bound = target.split()
    return value >= float(bound) if sign == ">=" else value <= float(bound)


def table(rows: Sequence[Row]) -> str:
    """The rows as text: both sides in milliseconds with quartiles, and the ratio."""
    cells = [("what", "left", "ms [quartiles]", "right", "ms [quartiles]", "right / left", "target", "met")]
    for r in rows:
        cells.append(
            (
                r.name, r.left, _ms(r.left_s, r.left_quartiles), r.right, _ms(r.right_s, r.right_quartiles),
                f"{r.ratio:.3g} [{r.low:.3g}, {r.high:.3g}]", r.target, {True: "yes", False: "NO", None: ""}[r.met],
            )
        )  # fmt: skip
    widths = [max(len(c[i]) for c in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(f"{x:<{w}}" for x, w in zip(c, widths, strict=True)).rstrip() for c in cells)


def _ms(median: float, quartiles: tuple[float, float]) -> str:
    return f"{1e3 * median:.4g} [{1e3 * quartiles[0]:.4g}, {1e3 * quartiles[1]:.4g}]"


def environment() -> dict[str, Any]:
    """Versions and the device."""
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jcompress": jc.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "processor": _processor(),
        "backend": device.platform,
        "device": device.device_kind,
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def finish(name: str, rows: Sequence[Row], out: str | None, **settings: Any) -> None:
    """Print the table and write the JSON."""
    print(table(rows))
    print(f"wrote {write(name, rows, out, **settings)}")


def write(name: str, rows: Sequence[Row], out: str | None, **settings: Any) -> Path:
    """Write the JSON, and say where."""
    path = Path(out or f"runs/benchmarks/{name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"benchmark": name, "settings": settings, "environment": environment()}
    record["rows"] = [dataclasses.asdict(r) for r in rows]
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def parser(description: str | None, pairs: int) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    found.add_argument("--pairs", type=int, default=pairs, help="how often the two sides take turns")
    found.add_argument("--out", default=None, help="the JSON file to write")
    return found
