"""Writes ``docs/tables.md``: what works on what, as it is found by trying it.

  PYTHONPATH=.:tests python docs/tables.py [--missing] [layouts] [primitives] [meshes]

Each table stands between two comments of its name; those not asked for stay as they are. ``layouts`` and ``meshes`` try
one row of the conformance list for each method, which takes some minutes the first time: what is compiled is kept.
With ``--missing`` only methods that have no line yet are tried.
"""

from __future__ import annotations

import inspect
import re
import string
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "tables.md"
RIGHT, WRONG, NOT_TAKEN = "✓", "**✗**", "·"


def layouts(before: str = "") -> str:
    """Methods x layouts: whether compressing a leaf laid out anew gives what compressing it gave, laid out anew.

    Args:
      before: a table whose lines are kept.
    """
    jax = _as_in_tests()
    from test_layouts import CASES, ROWS, check_case, takes

    jax.config.update("jax_disable_most_optimizations", True)
    letters, reasons = string.ascii_uppercase, re.findall(r"^<sup>\d+</sup> (.*)\.$", before, re.M)
    lines = _lines(before)

    def cell(row: Any, case: Any) -> str:
        if not takes(row, case):
            why = _refusal(row, case)
            if why not in reasons:
                reasons.append(why)
            return f"{NOT_TAKEN} {_raised(reasons.index(why) + 1)}"
        return RIGHT if _passes(check_case, row, case) else WRONG

    # A layout names stacked layers, so that they need no method.
    groups = _methods(row for row in ROWS if "stacked" not in row.name)
    chosen = {name: max(rows, key=lambda row: sum(takes(row, x) for x in CASES)) for name, rows in groups}
    found = [lines.get(name) or [f"`{name}`", *(cell(row, case) for case in CASES)] for name, row in chosen.items()]
    named = ", ".join(f"{letter} `{case.name}`" for letter, case in zip(letters, CASES, strict=False))
    told = [f"{_raised(i)} {why}." for i, why in enumerate(reasons, 1)]
    return "\n\n".join([f"{named}.", table(["method", *letters[: len(CASES)]], found), *told])


def _refusal(row: Any, case: Any) -> str:
    """Why a method does not take a layout, without the numbers of the example."""
    import jax.numpy as jnp

    import jcompress as jc

    try:
        jc.core.check(row.method, "w", case.seen[case.batch :], jnp.float32)
    except ValueError as error:
        return re.split(", found|;", str(error).removeprefix("w: "))[0]
    return f"{type(row.method).__name__} has as many rows as the values say, and layers would differ"


def meshes(before: str = "") -> str:
    """Methods x axis types of a mesh: whether a leaf sharded along any axis gives what it gives on one device."""
    jax = _as_in_tests()
    from jax.sharding import AxisType
    from rows import METHODS
    from test_conformance import sharded, test_sharding_is_kept_and_no_parameters_are_moved

    def cell(row: Any, axis_type: Any) -> str:
        jax.clear_caches()  # a process has room for some thousand compiled programs
        wrong = [
            axis
            for axis, shape in sharded(row)
            if not _passes(test_sharding_is_kept_and_no_parameters_are_moved, row, axis, shape, axis_type)
        ]
        return f"{WRONG} along axis {', '.join(map(str, wrong))}" if wrong else RIGHT

    moves = {False: "", True: "yes", "inputs": "where inputs are sharded"}
    lines = _lines(before)
    found = [
        lines.get(name)
        or [f"`{name}`", cell(rows[0], AxisType.Auto), cell(rows[0], AxisType.Explicit), moves[rows[0].gathers]]
        for name, rows in _methods(METHODS)
    ]
    return table(["method", "automatic axes", "explicit axes", "the array moves"], found)


def _lines(text: str) -> dict[str, list[str]]:
    """The lines of a table, by the method that each is of."""
    split = [[x.strip() for x in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")]
    return {cells[0].strip("`"): cells for cells in split}


def _as_in_tests() -> Any:
    """JAX with eight simulated devices and the tests' compilation cache."""
    sys.path.insert(0, str(PAGE.parents[1] / "tests"))  # its conftest.py, and not the one above
    import conftest

    return conftest.jax


def _methods(rows: Iterable[Any]) -> list[tuple[str, list[Any]]]:
    """The public names of methods, each with its rows, in the order of the list."""
    import jcompress as jc

    rooms = {"prune": jc.prune, "prune.dynamic": jc.prune.dynamic, "quantize": jc.quantize, "factorize": jc.factorize}
    rooms |= {"quantize.training": jc.quantize.training, "share": jc.share}
    public = {getattr(room, name): f"{place}.{name}" for place, room in rooms.items() for name in room.__all__}
    found: dict[str, list[Any]] = {}
    for row in rows:
        kind = type(row.method)
        name = public.get(kind, kind.__name__.lower() if inspect.getmodule(kind) is jc.combine else kind.__name__)
        found.setdefault(name, []).append(row)
    return list(found.items())


def _passes(check: Callable[..., None], *args: Any) -> bool:
    try:
        check(*args)
    except Exception as error:
        sys.stderr.write(f"{args}: {error}"[:500] + "\n")
        return False
    return True


def _raised(number: int) -> str:
    return f"<sup>{number}</sup>"


def primitives(before: str = "") -> str:
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


TABLES: dict[str, Callable[[str], str]] = {"layouts": layouts, "meshes": meshes, "primitives": primitives}


def main(names: Sequence[str]) -> None:
    """Write the tables of some names, all by default."""
    text, keeps = PAGE.read_text(), "--missing" in names
    for name in [name for name in names if name != "--missing"] or TABLES:
        start, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        if start not in text:
            sys.exit(f"{name}: no such table; use some of {', '.join(TABLES)}")
        before, rest = text.split(start)
        old, after = rest.split(end)
        text = f"{before}{start}\n{TABLES[name](old if keeps else '')}\n{end}{after}"
        PAGE.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
