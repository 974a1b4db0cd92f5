"""The table of groups, folded so that it fits a screen."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

Row = tuple[str, int, Sequence[tuple[str, int]], str | None]
"""Name, size, members, and why it stays."""

LINES, WIDTH, NAME = 36, 120, 44


def table(rows: Iterable[Row], unread: Mapping[str, int]) -> str:
    """Groups that can be cut, those alike in one line; then how many stay and why; then what was not read."""
    rows = list(rows)
    free = _folded([row for row in rows if row[3] is None])
    lines = [("group", "size", "alike", "cut together")] if free else []
    lines += [_line(*entry) for entry in free[: LINES - 8]]
    widths = [max((len(line[i]) for line in lines), default=0) for i in range(3)]
    told = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}" for a, b, c, d in lines]
    if len(free) > LINES - 8:
        told.append(f"and {sum(n for *_, n in free[LINES - 8 :])} more; .rows has all")
    reasons = Counter(row[3] for row in rows if row[3] is not None)
    told += [f"{n} {'stays' if n == 1 else 'stay'}: {reason}" for reason, n in reasons.most_common(4)]
    if len(reasons) > 4:
        told.append(f"{sum(n for _, n in reasons.most_common()[4:])} stay for other reasons; .rows has all")
    told += [f"{name}: met {n} times and not read; what it touches stays whole" for name, n in [*unread.items()][:4]]
    return "\n".join(_end(line) for line in told)


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


def _line(name: str, size: int, members: Sequence[tuple[str, int]], alike: int) -> tuple[str, str, str, str]:
    shown = ", ".join(f"{elided(path, 24)}[{axis}]" for path, axis in members[:3])
    more = f", and {len(members) - 3} more" if len(members) > 3 else ""
    return elided(name, NAME), str(size), str(alike), shown + more


def elided(path: str, width: int) -> str:
    """A path with its middle left out where it is longer."""
    if len(path) <= width:
        return path
    head = (width - 3) // 3
    return f"{path[:head]}...{path[len(path) - (width - 3 - head) :]}"


def _end(line: str) -> str:
    return line.rstrip() if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..."
