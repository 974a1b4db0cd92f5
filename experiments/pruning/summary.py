"""The table and the picture of score against sparsity."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.pruning.expectations import EXPECTED

Row = Mapping[str, Any]


def score(row: Row, kind: str) -> float:
    """Test accuracy in percent, or bits per byte."""
    return row["test_bits"] if kind == "text" else 100 * row["test_accuracy"]


def cells(rows: Iterable[Row], kind: str) -> dict[tuple[str, float], tuple[float, float, int]]:
    """Mean, standard deviation and number of seeds, by way and sparsity."""
    found: dict[tuple[str, float], list[float]] = {}
    for row in rows:
        found.setdefault((row["way"], row["sparsity"]), []).append(score(row, kind))
    return {k: (statistics.mean(v), statistics.stdev(v) if len(v) > 1 else 0.0, len(v)) for k, v in found.items()}


def markdown(rows: Sequence[Row], kind: str, sparsities: Sequence[float]) -> str:
    """One table for each model, the ways in the order in which they were run."""
    unit = "bits per byte, lower is better" if kind == "text" else "test accuracy in percent"
    parts = []
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        found = cells(mine, kind)
        seeds = max(n for *_, n in found.values())
        shown = [
            f"**{model}**: {unit}, mean ± standard deviation over {seeds} seeds.",
            "",
            "| | " + " | ".join(f"{100 * s:g}%" for s in sparsities) + " | the literature leads one to expect |",
            "| --- |" + " --- |" * (len(sparsities) + 1),
        ]
        if ("dense", 0.0) in found:
            shown.append(f"| dense | {_cell(found[('dense', 0.0)], kind)} |" + " |" * len(sparsities))
        for way in dict.fromkeys(row["way"] for row in mine if row["way"] != "dense"):
            numbers = [_cell(found.get((way, s)), kind) for s in sparsities]
            shown.append(f"| {way} | " + " | ".join(numbers) + f" | {EXPECTED.get(way, '')} |")
        parts.append("\n".join(shown))
    return "\n\n".join(parts)


def _cell(found: tuple[float, float, int] | None, kind: str) -> str:
    if found is None:
        return ""
    return f"{found[0]:.2f} ± {found[1]:.2f}" if kind == "text" else f"{found[0]:.1f} ± {found[1]:.1f}"


def picture(rows: Sequence[Row], kind: str, path: Path, title: str) -> None:
    """Score against density, one panel for each model and family of ways."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(row["model"] for row in rows))
    measured = {row["way"] for row in rows}
    families = {name: ways for name, ways in FAMILIES.items() if measured & set(ways)}
    figure, grid = plt.subplots(
        len(models), len(families), figsize=(4.6 * len(families), 3.6 * len(models)), sharey="row", squeeze=False
    )
    for line, model in zip(grid, models, strict=True):
        mine = [row for row in rows if row["model"] == model]
        found = cells(mine, kind)
        for axes, (family, ways) in zip(line, families.items(), strict=True):
            _panel(axes, found, ways)
            axes.set_title(f"{model}: {family}", fontsize=9)
            axes.set_xlabel("weights kept, percent")
        line[0].set_ylabel("bits per byte" if kind == "text" else "test accuracy, percent")
        if kind != "text":
            best = found.get(("dense", 0.0), (100.0,))[0]
            line[0].set_ylim(max(min(v[0] for v in found.values()), best - 30) - 1, best + 1.5)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


FAMILIES = {
    "after training, at once": (
        "random", "magnitude, uniform", "magnitude, ERK", "magnitude, LAMP", "magnitude, global", "Wanda", "SparseGPT",
    ),
    "after training, little by little or learned": (
        "random", "magnitude, gradual", "movement", "l0 (hard concrete)", "variational dropout", "lottery ticket",
        "lottery ticket, redrawn",
    ),
    "from the start": (
        "random at the start", "SNIP", "GraSP", "SynFlow", "SET", "RigL", "sparse momentum",
    ),
    "without fine-tuning": (
        "magnitude, not fine-tuned", "Wanda, not fine-tuned", "SparseGPT, not fine-tuned",
    ),
}  # fmt: skip


def _panel(axes: Any, found: Mapping[tuple[str, float], tuple[float, float, int]], ways: Sequence[str]) -> None:
    if ("dense", 0.0) in found:
        axes.axhline(found[("dense", 0.0)][0], color="0.5", linestyle=":", label="dense")
    for way in ways:
        points = sorted((100 * (1 - s), *found[w, s][:2]) for w, s in found if w == way)
        if points:
            x, y, spread = zip(*points, strict=True)
            style = {"color": "0.3", "linestyle": "--"} if way.startswith("random") else {}
            axes.errorbar(x, y, spread, marker="o", markersize=3, linewidth=1.2, capsize=2, label=way, **style)
    axes.set_xscale("log")
    axes.set_xticks([2, 5, 10, 20], ["2", "5", "10", "20"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
