"""The pictures of all experiments: families are colours, small multiples share axes, legends stand outside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jcompress import measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]


def compressed(found: Sequence[Row], path: Path, title: str) -> None:
    """The main job: quality against stored bytes, a panel for each model."""
    panels: dict[str, list[measure.Point]] = {}
    for row in found:
        if row["plan"] != "dense":  # as trained and as trained on, the dense net has one size; the fair one is shown
            panels.setdefault(f"{row['model']} on {title.split(':')[0]}", []).append(_point(row))
    text = found[0]["measure"] == "bits per byte"
    name = "- bits per byte on test (higher is better)" if text else "test accuracy (%)"
    points = [p for panel in panels.values() for p in panel]
    measure.pareto(panels, path, baseline="baseline", score_name=name, lowest=lowest(points))


def _point(row: Row) -> measure.Point:
    sign = -1 if row["measure"] == "bits per byte" else 1
    return measure.Point(row["plan"], row["bytes"], sign * row["mean"], row["std"] or 0.0)


def lowest(points: Sequence[measure.Point], far: float = 6.0) -> float | None:
    """Where the axis starts, if a control so far below would press all others together."""
    best = max(p.score for p in points)
    near = [p.score - p.score_std for p in points if p.score >= best - far]
    return float(int(min(near) - 0.5)) if len(near) < len(points) else None


Spread = tuple[float, float, int]
UNITS = {"image": "test error, %", "text": "bits per byte", "pairs": "100 (1 - rank correlation)"}
"""What is measured, by the kind of the data; lower is better."""

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_INK, _GREY = "#222222", "#777777"


def _figure(rows: int, columns: int, size: tuple[float, float], **shared: Any) -> tuple[Figure, Any]:
    """Panels in a grid, without ``pyplot``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def pruned(
    models: Mapping[str, Mapping[tuple[str, float], Spread]],
    families: Mapping[str, str],
    kind: str,
    path: Path,
    title: str,
) -> None:
    """Score against the part of weights kept, one panel for each model and family of ways, all of one scale.

    Errors are on a log scale, on which a tenth of a point near the top and chance at the bottom both show.

    Args:
      models: for each the mean, deviation and number of seeds, by way and sparsity.
      families: of the ways.
      kind: of the data.
      path: where to save the picture.
      title: of the whole.
    """
    measured = {way for found in models.values() for way, _ in found}
    shown = [f for f in dict.fromkeys(families.values()) if any(families[w] == f for w in families if w in measured)]
    size = (3.4 * len(shown) + 0.8, 3.0 * len(models) + 1.9)
    figure, grid = _figure(len(models), len(shown), size, sharex=True, sharey=True)
    for line, (model, found) in zip(grid, models.items(), strict=True):
        for axes, family in zip(line, shown, strict=True):
            _curves(axes, found, [way for way in families if families[way] == family and way in measured], kind)
        unit = "bits per byte" if kind == "text" else "test error, %"
        line[0].set_ylabel(f"{model}\n{unit}, lower is better")
    if kind != "text":
        least = min(_error(mean + std) for found in models.values() for mean, std, _ in found.values())
        grid[0, 0].set_ylim(0.8 * least, 110)
    for axes, family in zip(grid[0], shown, strict=True):
        axes.set_title(family, fontsize=9, loc="left", color=_INK)
    for axes in grid[-1]:
        axes.set_xlabel("weights kept, %")
        lines = axes.get_legend_handles_labels()
        axes.legend(*lines, loc="upper left", bbox_to_anchor=(0.0, -0.22), fontsize=8, frameon=False, borderaxespad=0)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    figure.savefig(path, dpi=110)


def _error(accuracy: float) -> float:
    """In percent, for a log scale."""
    return max(100 - accuracy, 0.3)


def _curves(axes: Axes, found: Mapping[tuple[str, float], Spread], ways: Sequence[str], kind: str) -> None:
    """The ways of one family, with the dense network and the random control for comparison."""

    height = float if kind == "text" else _error
    if ("dense", 0.0) in found:
        axes.axhline(height(found["dense", 0.0][0]), color=_INK, linestyle=":", linewidth=1, label="dense")
    controls = [way for way in ("random", "random at the start") if way in ways] or ["random"]
    colours = iter(_COLOURS)
    every = [*controls, *(way for way in ways if way not in controls)]
    for place, way in enumerate(every):
        points = sorted((100 * (1 - s), *found[w, s][:2]) for w, s in found if w == way)
        style = {"color": _GREY, "linestyle": "--"} if way in controls else {"color": next(colours)}
        x = [p[0] * 1.018 ** (place - len(every) / 2) for p in points]  # beside one another, not over
        y, low, high = ([height(m + sign * std) for _, m, std in points] for sign in (0, 1, -1))
        spread = [[max(b - a, 0) for a, b in zip(low, y, strict=True)], [b - a for a, b in zip(y, high, strict=True)]]
        if kind == "text":
            spread = [[std for *_, std in points]] * 2
        axes.errorbar(x, y, spread, marker="o", markersize=3, linewidth=1.2, capsize=2, label=way, **style)
    axes.set_xscale("log")
    axes.set_xticks([2, 5, 10, 20], ["2", "5", "10", "20"])
    axes.set_xticks([], minor=True)
    axes.set_xlim(1.65, 24.2)
    if kind != "text":
        axes.set_yscale("log")
        axes.set_yticks([0.5, 1, 2, 5, 10, 20, 50, 100], ["0.5", "1", "2", "5", "10", "20", "50", "100"])
        axes.set_yticks([], minor=True)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def quantized(found: Sequence[Row], families: Mapping[str, str], path: Path) -> None:
    """Quantized training: each way's score with its deviation, one panel for each task, the ways shared."""
    tasks = list(dict.fromkeys(row["task"] for row in found))
    ways = [way for way in families if any(row["way"] == way for row in found) and "rounded" not in way][::-1]
    names = list(dict.fromkeys(families[way] for way in families))
    colours = {name: _INK if name == "dense" else _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    figure, grid = _figure(1, len(tasks), (3.2 * len(tasks) + 3.4, 0.3 * len(ways) + 1.3), sharey=True)
    for axes, task in zip(grid[0], tasks, strict=True):
        own = {row["way"]: row for row in found if row["task"] == task}
        for i, way in enumerate(ways):
            if way in own:
                style = {"fmt": "o", "capsize": 3, "color": colours[families[way]]}
                axes.errorbar(own[way]["mean"], i, xerr=own[way]["std"], **style)
        if "dense" in own:
            axes.axvline(own["dense"]["mean"], color=_GREY, linewidth=1, linestyle=":", zorder=0)
        axes.set_yticks(range(len(ways)), ways)
        axes.set_title(task, fontsize=10, loc="left", color=_INK)
        axes.set_xlabel("bits per byte, lower is better" if task == "text" else "test accuracy, %")
        axes.spines[["top", "right"]].set_visible(False)
    percent = [axes for axes, task in zip(grid[0], tasks, strict=True) if task != "text"]
    limits = [x for axes in percent for x in axes.get_xlim()]
    for axes, task in zip(grid[0], tasks, strict=True):
        if task == "text":
            axes.invert_xaxis()
        else:
            axes.set_xlim(min(limits), max(limits))
    figure.suptitle("What was only rounded, and not trained, is in the table.", fontsize=9, x=0.01, ha="left")
    figure.savefig(path, dpi=110)


def encoders(rows: Sequence[Row], path: Path) -> None:
    """The sentence encoder: agreement with human judgement against stored bytes."""
    points = [measure.Point(r["name"], r["bytes"], 100 * r["mean"], group=r["group"]) for r in rows]
    measure.pareto(points, path, score_name="mean Spearman x 100", lowest=lowest(points))


_WORST = 300.0


def language(rows: Sequence[Row], path: Path) -> None:
    """A decoder: perplexity, logarithmic, against stored megabytes, a look a method; healed rows hollow.

    Files below half of the largest stand beside the others; what is worse than 300 stands on the upper edge.
    """
    figure, ((left, right),) = _figure(1, 2, (11.0, 5.0), sharey=True)
    most = max(r["bytes"] for r in rows)
    dense = next((r["perplexity"] for r in rows if r["name"] == "half"), 0.0)
    worst = max(_WORST, 4 * dense)
    for axes, small in ((left, True), (right, False)):
        here = [r for r in rows if (r["bytes"] < most / 2) == small]
        for i, method in enumerate(dict.fromkeys(map(_method, here))):
            look = {"linestyle": "", "marker": "os^vDP"[i // len(_COLOURS)], "color": _COLOURS[i % len(_COLOURS)]}
            for healed in (False, True):
                own = [r for r in here if _method(r) == method and r["group"].endswith(", healed") == healed]
                points = [(r["bytes"] / 1e6, min(r["perplexity"], worst)) for r in own]
                face = {"markerfacecolor": "none"} if healed else {"label": method}
                if points:
                    axes.plot(*zip(*points, strict=True), **look, **face, clip_on=False)
        axes.set(yscale="log", ylim=(0.95 * dense or None, worst))
        if dense:
            axes.axhline(dense, color=_INK, linestyle=":", linewidth=1)
        if worst == _WORST:
            axes.set_yticks([30, 40, 60, 100, 200, 300], ["30", "40", "60", "100", "200", "300 and more"])
            axes.minorticks_off()
        axes.set(xlabel="stored MB")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if here:
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    left.set(ylabel="perplexity")
    figure.savefig(path, dpi=110)


def _method(row: Row) -> str:
    """Of a row of a decoder, however positions count and whether it is healed."""
    return row["group"].removesuffix(", healed").removesuffix(", attended").removesuffix(", guided")


def families(found: Sequence[Row], kind: str, path: Path, title: str) -> None:
    """Score against stored bytes and against multiply-adds, as compressed and fine-tuned, a line a family.

    Args:
      found: a row a family and point, with ``before`` and ``after`` as means and deviations.
      kind: of the data.
      path: where to save the picture.
      title: of the whole.
    """
    groups = [x for x in dict.fromkeys(row["group"] for row in found) if x != "dense"]
    figure, grid = _figure(len(groups), 3, (11.5, 2.5 * len(groups) + 1.0), sharey=True, sharex="col")
    axes_of = (("bytes", "before", "bytes, as compressed"), ("bytes", "after", "bytes, fine-tuned"))
    axes_of = (*axes_of, ("multiply_adds", "after", "multiply-adds, fine-tuned"))
    dense = next((row for row in found if row["way"] == "dense"), None)
    for line, group in zip(grid, groups, strict=True):
        own = list(dict.fromkeys(row["way"] for row in found if row["group"] == group))
        for axes, (size, when, name) in zip(line, axes_of, strict=True):
            if dense is not None:
                axes.axhline(dense[when][0], color=_INK, linestyle=":", linewidth=1, label="dense")
            for i, way in enumerate(own):
                points = sorted((row[size], row[when][0]) for row in found if row["way"] == way)
                control = "random" in way
                style = {"color": _GREY, "linestyle": "--"} if control else {"color": _COLOURS[i % len(_COLOURS)]}
                marker = "os^vD"[i // len(_COLOURS)]
                axes.plot(*zip(*points, strict=True), marker=marker, markersize=3, linewidth=1.2, label=way, **style)
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter("")
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            if group == groups[-1]:
                axes.set_xlabel(name)
        line[0].set_ylabel(UNITS[kind])
        line[0].set_title(group, fontsize=9, loc="left", color=_INK)
        lines = line[-1].get_legend_handles_labels()
        line[-1].legend(*lines, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    values = [row[when][0] for row in found for when in ("before", "after")]
    grid[0, 0].set_yscale("log")
    grid[0, 0].set_ylim(0.9 * min(values), 1.1 * max(values))
    ticks = [x for x in (0.5, 1, 1.5, 2, 3, 5, 10, 20, 40, 80) if 0.9 * min(values) < x < 1.1 * max(values)]
    grid[0, 0].set_yticks(ticks, [f"{x:g}" for x in ticks])
    grid[0, 0].set_yticks([], minor=True)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    figure.savefig(path, dpi=110)


def bars(rows: Sequence[tuple[str, float, float | None]], name: str, path: Path) -> None:
    """Means with their deviations, a line each, from the best to the worst below.

    Args:
      rows: name, mean, and deviation over seeds or None.
      name: of the axis; lower is better.
      path: where to save the picture.
    """
    found = sorted(rows, key=lambda row: row[1])
    figure, grid = _figure(1, 1, (6.0, 0.24 * len(found) + 0.8))
    axes = grid[0, 0]
    for i, (label, mean, std) in enumerate(found):
        colour = {"teacher": _INK, "plain": _COLOURS[1]}.get(label, _GREY if "permuted" in label else _COLOURS[0])
        axes.errorbar(mean, i, xerr=std or None, fmt="o", markersize=4, color=colour, linewidth=1.2)
    axes.set_yticks(range(len(found)), [label for label, _, _ in found])
    axes.invert_yaxis()
    axes.set_xlabel(name)
    axes.grid(alpha=0.3, axis="x")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
