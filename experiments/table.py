"""From measurements to a table and a picture."""

from __future__ import annotations

import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.image as plt_image
import numpy as np

from experiments.jobs import BASELINE, DENSE
from jcompress import measure

Row = dict[str, Any]


def line(row: Mapping[str, Any]) -> str:
    """One measurement, as it is made."""
    bits = row["bits_per_byte"]
    quality = f"{100 * row['accuracy']:6.2f}%" if bits is None else f"{bits:.3f} bits/byte"
    name = f"{row['model']} seed {row['seed']} {row['plan']}"
    return f"{name:<40} {quality}  {row['bytes']:>11,} bytes {row['ratio']:6.1f}x  {row['seconds']:.1f} s"


def summarize(results: Sequence[Mapping[str, Any]], order: Sequence[tuple[str, str]]) -> list[Row]:
    """Mean and standard deviation over seeds, for each model and plan that was measured.

    The change is the mean over seeds of the difference to the baseline of the same seed: points of accuracy, or
    bits per byte.
    """
    rows = []
    for model, plan in order:
        found = [r for r in results if (r["model"], r["plan"]) == (model, plan)]
        if not found:
            continue
        baseline = {r["seed"]: r for r in results if (r["model"], r["plan"]) == (model, BASELINE)}
        text = found[0]["bits_per_byte"] is not None
        values = [_quality(r) for r in found]
        pairs = [_quality(r) - _quality(baseline[r["seed"]]) for r in found if r["seed"] in baseline]
        rows.append(
            {
                "model": model,
                "plan": plan,
                "measure": "bits per byte" if text else "accuracy (%)",
                "mean": statistics.fmean(values),
                "std": statistics.stdev(values) if len(values) > 1 else None,
                "change": statistics.fmean(pairs) if pairs else None,
                "seeds": len(values),
                "bytes": statistics.fmean(r["bytes"] for r in found),
                "ratio": statistics.fmean(r["ratio"] for r in found),
                "multiply_adds": statistics.fmean(r["multiply_adds"] for r in found),
                "latency": _latency([r["latency"] for r in found]),
            }
        )
    return rows


def _quality(row: Mapping[str, Any]) -> float:
    return 100 * row["accuracy"] if row["bits_per_byte"] is None else row["bits_per_byte"]


def _latency(found: Sequence[list[float] | None]) -> list[float] | None:
    """Median, 10th and 90th percentile in seconds, each the mean over seeds."""
    known = [x for x in found if x is not None]
    return [statistics.fmean(column) for column in zip(*known, strict=True)] if known else None


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    measure = rows[0]["measure"] if rows else "accuracy (%)"
    digits = 3 if measure == "bits per byte" else 2
    head = ["model", "plan", f"test {measure}", f"vs {BASELINE}", "bytes", "ratio", "multiply-adds *", "latency"]
    cells = [head]
    for row in rows:
        spread = "" if row["std"] is None else f" ± {row['std']:.{digits}f}"
        change = "" if row["change"] is None or row["plan"] == BASELINE else f"{row['change']:+.{digits}f}"
        low_high = row["latency"]
        shown = "not accelerated"
        if low_high is not None:
            median, low, high = (1e3 * x for x in low_high)
            shown = f"{median:.2f} ms ({low:.2f}-{high:.2f})"
        cells.append(
            [
                row["model"],
                row["plan"],
                f"{row['mean']:.{digits}f}{spread}",
                change,
                f"{row['bytes']:,.0f}",
                f"{row['ratio']:.1f}x",
                f"{row['multiply_adds']:,.0f}",
                shown,
            ]
        )
    return cells


def _notes(rows: Sequence[Row]) -> list[str]:
    seeds = max((row["seeds"] for row in rows), default=0)
    over = f"Mean and standard deviation over {seeds} seeds" if seeds > 1 else "One seed"
    return [
        f"{over}. {DENSE}: as trained.",
        f"{BASELINE}: the dense net after the fine-tuning epochs that every plan gets.",
        "bytes: size of the saved file. ratio: to the file of the dense float32 net.",
        "* of one example, in theory: zeros skipped, factors applied in turn. Nothing here runs that fast yet.",
        "latency: one batch, median (10th to 90th percentile) of 50 calls.",
    ]


def text(rows: Sequence[Row]) -> str:
    """The table in aligned columns, with what they mean below."""
    cells = _cells(rows)
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    left = (0, 1, 7)
    lines = []
    for i, row in enumerate(cells):
        if i and row[0] != cells[i - 1][0]:
            lines.append("-" * (sum(widths) + 2 * len(widths) - 2))
        aligned = (f"{x:<{w}}" if j in left else f"{x:>{w}}" for j, (x, w) in enumerate(zip(row, widths, strict=True)))
        lines.append("  ".join(aligned).rstrip())
    return "\n".join([*lines, "", *_notes(rows)])


def markdown(rows: Sequence[Row]) -> str:
    """The table in Markdown."""
    head, *body = _cells(rows)
    rule = ["---", "---", "---:", "---:", "---:", "---:", "---:", "---"]
    lines = ["| " + " | ".join(x.replace("*", "\\*") for x in row) + " |" for row in (head, rule, *body)]
    return "\n".join([*lines, "", *(note.replace("*", "\\*") + "  " for note in _notes(rows))])


def picture(rows: Sequence[Row], path: Path, title: str) -> None:
    """Quality against stored bytes, a panel for each model."""
    panels = []
    for model in dict.fromkeys(row["model"] for row in rows):
        # As trained and as trained on, the dense net has the same size; the fair one is shown.
        found = [row for row in rows if row["model"] == model and row["plan"] != DENSE]
        points = [_point(row) for row in found]
        figure = measure.pareto(points, baseline=BASELINE, score_name=_score_name(found[0]), lowest=_lowest(points))
        figure.axes[0].set_title(f"{model} on {title.split(':')[0]}", loc="left", fontsize=10)
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=150)
        panels.append(plt_image.imread(io.BytesIO(buffer.getvalue())))
    plt_image.imsave(path, np.ascontiguousarray(np.concatenate(panels)))


def _point(row: Row) -> measure.Point:
    sign = -1 if row["measure"] == "bits per byte" else 1
    return measure.Point(row["plan"], row["bytes"], sign * row["mean"], row["std"] or 0.0)


def _lowest(points: Sequence[measure.Point], far: float = 6.0) -> float | None:
    """Where the axis starts, if a control so far below would press all others together."""
    best = max(p.score for p in points)
    near = [p.score - p.score_std for p in points if p.score >= best - far]
    return min(near) - 0.5 if len(near) < len(points) else None


def _score_name(row: Row) -> str:
    return "- bits per byte on test (higher is better)" if row["measure"] == "bits per byte" else "test accuracy (%)"
