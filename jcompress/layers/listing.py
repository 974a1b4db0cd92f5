"""The table of groups, folded so that it fits a screen."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

Row = tuple[str, int, Sequence[tuple[str, int]], str | None]
"""Name, size, members, and why it stays."""

LINES, WIDTH, NAME, MEMBER = 36, 120, 40, 32


def table(rows: Iterable[Row], unread: Mapping[str, int]) -> str:
    """Groups that can be cut, those alike in one line; then how many stay and why; then what was not read."""
    rows = list(rows)
    free = _folded([row for row in rows if row[3] is None])
    told = _lines(free[: LINES - 8])
    if len(free) > LINES - 8:
        told.append(f"and {sum(n for *_, n in free[LINES - 8 :])} more; .rows has all")
    reasons = Counter(row[3] for row in rows if row[3] is not None)
    told += [f"{n} {'stays' if n == 1 else 'stay'}: {reason}" for reason, n in reasons.most_common(4)]
    if len(reasons) > 4:
        told.append(f"{sum(n for _, n in reasons.most_common()[4:])} stay for other reasons; .rows has all")
    told += [f"{name}: met {n} times and not read; what it touches stays whole" for name, n in [*unread.items()][:4]]
    return "\n".join(line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..." for line in told)


def _lines(entries: Sequence[tuple[str, int, Sequence[tuple[str, int]], int]]) -> list[str]:
    """The head, and a line for each; as many members as fit."""
    if not entries:
        return []
    first = [("group", "size", "alike")] + [(elided(name, NAME), str(size), str(n)) for name, size, _, n in entries]
    widths = [max(len(line[i]) for line in first) for i in range(3)]
    starts = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  " for a, b, c in first]
    members = [
        _members([f"{elided(path, MEMBER)}[{axis}]" for path, axis in m], len(starts[0])) for *_, m, _ in entries
    ]
    return [(start + rest).rstrip() for start, rest in zip(starts, ["cut together", *members], strict=True)]


def _members(names: Sequence[str], used: int) -> str:
    for n in range(len(names), 0, -1):
        text = ", ".join(names[:n]) + (f", and {len(names) - n} more" if n < len(names) else "")
        if used + len(text) <= WIDTH or n == 1:
            return text
    return ""


def _folded(rows: Sequence[Row]) -> list[tuple[str, int, Sequence[tuple[str, int]], int]]:
    """Groups that differ in the numbers of their paths only, as one: the first, and how many."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        name, size, members, _ = row
        alike = (_numberless(name), size, tuple((_numberless(path), axis) for path, axis in members))
        found.setdefault(alike, []).append(row)
    return [(same[0][0], same[0][1], same[0][2], len(same)) for same in found.values()]


def _numberless(path: str) -> str:
    return re.sub(r"\d+(?![^\[]*\])", "*", path)


def elided(path: str, width: int) -> str:
    """A path with its middle left out where it is longer."""
    if len(path) <= width:
        return path
    head = (width - 3) // 3
    return f"{path[:head]}...{path[len(path) - (width - 3 - head) :]}"
