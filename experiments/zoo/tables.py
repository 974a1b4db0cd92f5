"""The table of the zoo."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.tables import aligned, markdown
from experiments.workdir import Row, write

HEAD = (
    "package", "model", "parameters", "groups", "free", "cut to", "shrunk off by", "gradients off by", "calibrated",
    "Gram checked", "layouts", "bytes", "fast", "dense", "accelerated off by", "multiply-adds", "of XLA's operations",
    "what fell short",
)  # fmt: skip
LEFT = (0, 1, 17)


def finish(rows: Sequence[Row], path: Path) -> None:
    """Write the table."""
    packages = {row["package"] for row in rows}
    wrong = sum(len(row["wrong"]) for row in rows)
    head = (
        f"{len(rows)} models from {len(packages)} packages, from `python -m experiments.zoo`; every leaf random.\n\n"
        "*groups* of axes that are cut together, how many of them are *free*, and the share of parameters left when "
        "each free group loses two units in five; *off by*: the largest difference to the masked function, relative to "
        "the largest value. *calibrated*: matrices with statistics, of those that meet an activation; *Gram checked*: "
        "compared with a sum of x x^T that was taken without the library. *layouts*: read from shapes alone, of the "
        "same matrices. *bytes*: how much smaller with int8, rank 3 and half of the weights in turn. *fast* and "
        "*dense*: products with nodes that `accelerate` makes without and with the dense array, and the largest "
        "difference of its outputs to the dense function. *multiply-adds*: equal to those of all products of the "
        "jaxpr; *of XLA's operations*: all operations counted, as a share of XLA's count before it optimizes, which "
        "counts the body of a loop once. "
        f"{'Nothing was wrong.' if not wrong else f'{wrong} readings were wrong.'}\n"
    )
    write(path, f"{head}\n{markdown(cells(rows), LEFT)}\n")


def text(rows: Sequence[Row]) -> str:
    """The same for a terminal."""
    return aligned(cells(rows), LEFT)


def cells(rows: Sequence[Row]) -> list[Sequence[str]]:
    return [HEAD, *map(_cells, rows)]


def _cells(row: Row) -> Sequence[str]:
    def shown(name: str, form: str = "") -> str:
        return format(row[name], form) if name in row else "-"

    return (
        f"{row['package']} {row['version']}", row["model"], f"{row['parameters']:,}", shown("groups"),
        shown("prunable"), shown("shrunk_to", ".0%"), shown("shrunk_error", ".0e"), shown("gradient_error", ".0e"),
        _share(row, "calibrated"), shown("grams_compared"), _share(row, "layouts"),
        f"{shown('bytes_ratio')}x", shown("fast_rows"), shown("dense_rows"), shown("execution_error", ".0e"),
        _counted(row), _of_xla(row), short(row),
    )  # fmt: skip


def _share(row: Row, name: str) -> str:
    return f"{row[name]}/{row[name] + len(row[f'not_{name}'])}" if name in row else "-"


def _counted(row: Row) -> str:
    if "multiply_adds" not in row:
        return "-"
    return f"{row['multiply_adds']:,.0f}" + ("" if row["cost_checked"] else " (not compared)")


def _of_xla(row: Row) -> str:
    return f"{row['flops'] / row['xla_flops']:.1%}" if row.get("xla_flops") else "-"


def short(row: Row) -> str:
    """What is wrong, and what was not read, in a cell."""
    told = [f"WRONG {name}: {what}" for name, what in row["wrong"].items()]
    told += [f"coupling does not read {name} ({count})" for name, count in row.get("unread_primitives", {}).items()]
    reasons: dict[str, list[str]] = {}
    for path, why in row.get("not_calibrated", {}).items():
        reasons.setdefault(why, []).append(path)
    told += [f"no statistics of {_some(paths)}: {why}" for why, paths in reasons.items()]
    for path, why in row.get("not_layouts", {}).items():
        if path not in row.get("not_calibrated", {}):
            told.append(f"no layout of {path}: {why}")
    expected = ("dense: Masked is made dense",)  # half of the weights at random places: no product skips them
    told += [f"{how} ({count})" for how, count in row.get("dense_why", {}).items() if how not in expected]
    told += row.get("cost_notes", [])
    return "; ".join(told).replace("|", "/")


def _some(paths: list[str]) -> str:
    return paths[0] + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
