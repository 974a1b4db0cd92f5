"""Writes ``docs/tables.md``: what works on what, as it is found by trying it.

  PYTHONPATH=.:tests python docs/tables.py [layouts] [primitives] [meshes]

Each table stands between two comments of its name; those not asked for stay as they are. ``layouts`` tries every row
of the conformance list on every layout, and takes some minutes.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
PAGE = Path(__file__).parent / "tables.md"


def layouts() -> str:
    """Methods x layouts: whether compressing a leaf laid out anew gives what compressing it gave, laid out anew."""
    from test_layouts import CASES, ROWS, check_case, takes

    lines = []
    for row in ROWS:
        cells = []
        for case in CASES:
            if not takes(row, case):
                cells.append("")
                continue
            try:
                check_case(row, case)
                cells.append("yes")
            except AssertionError:
                cells.append("**no**")
        lines.append([row.name, *cells])
    return table(["method", *(case.name for case in CASES)], lines)


def meshes() -> str:
    """Methods x axis types of a mesh: whether a leaf sharded along any axis gives what it gives on one device."""
    from jax.sharding import AxisType
    from rows import METHODS
    from test_conformance import sharded, test_sharding_is_kept_and_no_parameters_are_moved

    def tried(row: Any, axis_type: Any) -> str:
        for axis, shape in sharded(row):
            try:
                test_sharding_is_kept_and_no_parameters_are_moved(row, axis, shape, axis_type)
            except Exception as error:
                told = (str(error) or type(error).__name__).strip().splitlines()[0]
                return f"**no**, along axis {axis}: {told[:60]}"
        return {False: "yes", True: "yes, gathered"}.get(row.gathers, f"yes, gathered where {row.gathers} are sharded")

    lines = [[row.name, tried(row, AxisType.Auto), tried(row, AxisType.Explicit)] for row in METHODS]
    return table(["method", "automatic axes", "explicit axes"], lines)


def primitives() -> str:
    """Primitives x readings, from the table that all readings go by."""
    from jcompress.trace import primitives as known

    fixed, lines = type(known.UNREAD.rule), []
    groups: dict[tuple[str, str, str], list[str]] = {}
    for name, row in known.ROWS.items():
        coupled = "stays whole" if type(row.rule) is fixed else _words(type(row.rule).__name__)
        flow = _words(type(row.flow).__name__)
        counted = {known.ops.NONE: "nothing", known.ops.UNKNOWN: "named, not counted"}.get(row.count, "counted")
        groups.setdefault((coupled, flow, counted), []).append(name)
    for (coupled, flow, counted), names in sorted(groups.items()):
        lines.append([" ".join(f"`{name}`" for name in sorted(names)), coupled, flow, counted])
    return table(["primitives", "coupling and shrink", "calibrate and accelerate", "cost"], lines)


def _words(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower().replace("custom", "custom ").strip().replace("  ", " ")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


TABLES: dict[str, Callable[[], str]] = {"layouts": layouts, "meshes": meshes, "primitives": primitives}


def main(names: Sequence[str]) -> None:
    """Write the tables of some names, all by default."""
    text = PAGE.read_text()
    for name in names or TABLES:
        start, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        if start not in text:
            sys.exit(f"{name}: no such table; use some of {', '.join(TABLES)}")
        before, rest = text.split(start)
        text = f"{before}{start}\n{TABLES[name]()}\n{end}{rest.split(end)[1]}"
        PAGE.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
