"""The table of the zoo."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.tables import aligned, markdown
from experiments.workdir import Row, write

HEAD = (
    "package", "model", "parameters", "groups", "free", "cut to", "shrunk off by", "gradients off by", "calibrated",
    "Gram checked", "bytes", "fast", "dense", "what fell short",
)  # fmt: skip
LEFT = (0, 1, 13)
UNUSED = "in no product with an activation"  # a bias, a table of positions: nothing to know


def finish(rows: Sequence[Row], path: Path) -> None:
    """Write the table."""
    packages = {row["package"] for row in rows}
    wrong = sum(len(row["wrong"]) for row in rows)
    head = (
        f"{len(rows)} models from {len(packages)} packages, from `python -m experiments.zoo`; every leaf random.\n\n"
        "*groups* of axes that are cut together, how many of them are *free*, and the share of parameters left when "
        "each free group loses two units in five; *off by*: the largest difference to the masked function, relative to "
        "the largest value. *calibrated*: matrices with statistics, of those that meet an activation; *Gram checked*: "
        "compared with a sum of x x^T that was taken without the library. *bytes*: how much smaller with int8, rank 3 "
        "and half of the weights in turn. *fast* and *dense*: products with nodes that `accelerate` makes without and "
        "with the dense array, equal to the dense function in both. Multiply-adds were compared with those of all "
        f"products of the jaxpr. {'Nothing was wrong.' if not wrong else f'{wrong} readings were wrong.'}\n"
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

    unread = _unread(row.get("uncalibrated", {}))
    known = f"{row['calibrated']}/{row['calibrated'] + len(unread)}" if "calibrated" in row else "-"
    return (
        row["package"], row["model"], f"{row['parameters']:,}", shown("groups"), shown("prunable"),
        shown("shrunk_to", ".0%"), shown("shrunk_error", ".0e"), shown("gradient_error", ".0e"), known,
        shown("grams_compared"), f"{shown('bytes_ratio')}x", shown("fast_rows"), shown("dense_rows"), short(row),
    )  # fmt: skip


def _unread(reasons: dict[str, str]) -> dict[str, str]:
    return {path: why for path, why in reasons.items() if why != UNUSED}


def short(row: Row) -> str:
    """What is wrong, and what was not read, in a cell."""
    told = [f"WRONG {name}: {what}" for name, what in row["wrong"].items()]
    told += [f"coupling does not read {name} ({count})" for name, count in row.get("unread_primitives", {}).items()]
    reasons: dict[str, list[str]] = {}
    for path, why in _unread(row.get("uncalibrated", {})).items():
        reasons.setdefault(why, []).append(path)
    told += [f"no statistics of {_some(paths)}: {why}" for why, paths in reasons.items()]
    for path, why in _unread(row.get("no_layout", {})).items():
        if path not in row.get("uncalibrated", {}):
            told.append(f"no layout of {path}: {why}")
    expected = ("dense: Masked is made dense",)  # half of the weights at random places: no product skips them
    told += [f"{how} ({count})" for how, count in row.get("dense_why", {}).items() if how not in expected]
    told += row.get("cost_notes", [])
    return "; ".join(told).replace("|", "/")


def _some(paths: list[str]) -> str:
    return paths[0] + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
