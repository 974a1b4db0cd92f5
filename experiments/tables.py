"""Tables: cells as aligned text or Markdown, means over seeds, and the table of the main job."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import pictures
from experiments.workdir import write

Row = Mapping[str, Any]
Cells = Sequence[Sequence[str]]


def aligned(cells: Cells, left: Iterable[int] = (0,), ruled: bool = False) -> str:
    """Columns of equal width, the head first.

    Args:
      cells: rows of texts.
      left: the columns that are flush left; all others are flush right.
      ruled: whether a line stands where the first cell of a row differs from that above.
    """
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines, flush = [], set(left)
    for i, row in enumerate(cells):
        if ruled and i and row[0] != cells[i - 1][0]:
            lines.append("-" * (sum(widths) + 2 * len(widths) - 2))
        shown = (f"{x:<{w}}" if j in flush else f"{x:>{w}}" for j, (x, w) in enumerate(zip(row, widths, strict=True)))
        lines.append("  ".join(shown).rstrip())
    return "\n".join(lines)


def markdown(cells: Cells, left: Iterable[int] = (0,)) -> str:
    """The same in Markdown."""
    flush = set(left)
    rule = ["---" if i in flush else "---:" for i in range(len(cells[0]))]
    rows = [cells[0], rule, *cells[1:]]
    return "\n".join("|" + "|".join(f" {x} ".replace("*", "\\*") if x else " " for x in row) + "|" for row in rows)


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample deviation; None for the deviation of one."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def spread(mean: float, std: float | None, digits: int = 2) -> str:
    """A mean with its deviation."""
    return f"{mean:.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")


# ---- The main job ----------------------------------------------------------------------------------------------------

DENSE, BASELINE = "dense", "baseline"


def line(row: Row) -> str:
    """One measurement, as it is made."""
    bits = row["bits_per_byte"]
    quality = f"{100 * row['accuracy']:6.2f}%" if bits is None else f"{bits:.3f} bits/byte"
    name = f"{row['model']} seed {row['seed']} {row['plan']}"
    return f"{name:<40} {quality}  {row['bytes']:>11,} bytes {row['ratio']:6.1f}x"


def finish(rows: Sequence[Row], table: Path, picture: Path, title: str) -> str:
    """Write the table and the picture of the main job; return the table as text."""
    found = summarize(rows)
    below = "\n".join(note.replace("*", "\\*") + "  " for note in notes(found))
    write(table, f"{markdown(cells(found), (0, 1, 7))}\n\n{below}\n")
    pictures.compressed(found, picture, title)
    return f"{aligned(cells(found), (0, 1, 7), ruled=True)}\n\n" + "\n".join(notes(found))


def summarize(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds, for each model and plan in the order of the rows.

    The change is the mean over seeds of the difference to the baseline of the same seed: points of accuracy, or
    bits per byte.
    """
    found = []
    for model, plan in dict.fromkeys((r["model"], r["plan"]) for r in rows):
        own = [r for r in rows if (r["model"], r["plan"]) == (model, plan)]
        baseline = {r["seed"]: r for r in rows if (r["model"], r["plan"]) == (model, BASELINE)}
        pairs = [_quality(r) - _quality(baseline[r["seed"]]) for r in own if r["seed"] in baseline]
        mean, std = mean_std([_quality(r) for r in own])
        found.append(
            {
                "model": model,
                "plan": plan,
                "measure": "accuracy (%)" if own[0]["bits_per_byte"] is None else "bits per byte",
                "mean": mean,
                "std": std,
                "change": statistics.fmean(pairs) if pairs else None,
                "seeds": len(own),
                **{k: statistics.fmean(r[k] for r in own) for k in ("bytes", "ratio", "multiply_adds")},
                "latency": _latency([r["latency"] for r in own]),
            }
        )
    return found


def _quality(row: Row) -> float:
    return 100 * row["accuracy"] if row["bits_per_byte"] is None else row["bits_per_byte"]


def _latency(found: Sequence[list[float] | None]) -> list[float] | None:
    """Median, 10th and 90th percentile in seconds, each the mean over seeds."""
    known = [x for x in found if x is not None]
    return [statistics.fmean(column) for column in zip(*known, strict=True)] if known else None


def cells(found: Sequence[Row]) -> list[list[str]]:
    """What :func:`summarize` gives as texts, the head first."""
    measure = found[0]["measure"] if found else "accuracy (%)"
    digits = 3 if measure == "bits per byte" else 2
    head = ["model", "plan", f"test {measure}", f"vs {BASELINE}", "bytes", "ratio", "multiply-adds *", "latency"]
    rows = [head]
    for r in found:
        change = "" if r["change"] is None or r["plan"] == BASELINE else f"{r['change']:+.{digits}f}"
        shown = "not accelerated"
        if r["latency"] is not None:
            median, low, high = (1e3 * x for x in r["latency"])
            shown = f"{median:.2f} ms ({low:.2f}-{high:.2f})"
        size = [f"{r['bytes']:,.0f}", f"{r['ratio']:.1f}x", f"{r['multiply_adds']:,.0f}"]
        rows.append([r["model"], r["plan"], spread(r["mean"], r["std"], digits), change, *size, shown])
    return rows


def notes(found: Sequence[Row]) -> list[str]:
    """What the columns mean."""
    seeds = max((r["seeds"] for r in found), default=0)
    over = f"Mean and standard deviation over {seeds} seeds" if seeds > 1 else "One seed"
    return [
        f"{over}. {DENSE}: as trained.",
        f"{BASELINE}: the dense net after the fine-tuning epochs that every plan gets.",
        "bytes: size of the saved file. ratio: to the file of the dense float32 net.",
        "* of one example, in theory: zeros skipped, factors applied in turn. Nothing here runs that fast yet.",
        "latency: one batch, median (10th to 90th percentile) of 50 calls.",
    ]
