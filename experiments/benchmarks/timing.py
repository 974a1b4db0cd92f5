"""The skeleton of all benchmarks: flags, cases, paired timing, table and JSON.

A benchmark is a list of flags and a function that gives its cases; :func:`run` does the rest. In a case two sides take
turns, so the noise of the machine hits both, and only their ratio is reported.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import flags, tables
from experiments.environment import environment
from experiments.runner import refuse
from experiments.workdir import write as write_file

Side = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """Two sides to compare; they are built only where ``--only`` does not leave the case out.

    Attributes:
      name: of the row.
      left: the name of the left side.
      right: the name of the right side.
      make: ``make() -> (left, right)`` or ``(left, right, extra)``, with more values for the row; None where a side
        cannot be had.
      target: ``">= x"`` or ``"<= x"`` for the ratio.
      calls: of each side for one time.
      part: of the pairs, where a side is slow.
      warm: calls of each side before any is timed.
      clock: what tells the time; ``time.process_time`` counts what a loaded machine takes for others out.
    """

    name: str
    left: str
    right: str
    make: Callable[[], tuple | None]
    target: str = ""
    calls: tuple[int, int] = (1, 1)
    part: float = 1.0
    warm: int = 2
    clock: Callable[[], float] = time.perf_counter


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison. ``ratio`` is the median of the paired ``right / left``; ``low`` and ``high``, its quartiles.

    ``left_s`` and ``right_s`` are medians in seconds, each with the quartiles of its times beside it.
    """

    name: str
    left: str
    right: str
    left_s: float
    left_quartiles: tuple[float, float]
    right_s: float
    right_quartiles: tuple[float, float]
    ratio: float
    low: float
    high: float
    pairs: int
    target: str = ""
    met: bool | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


class Names(tuple):
    """Names of which a flag takes some; all of them by default."""


def run(
    name: str,
    doc: str | None,
    cases: Callable[[argparse.Namespace], Iterable[Case]],
    options: Mapping[str, tuple[Any, str]],
    argv: Sequence[str] | None = None,
    *,
    pairs: int,
    about: Callable[[argparse.Namespace], Mapping[str, Any]] = lambda args: {},
) -> list[Row]:
    """A benchmark from its command line to its table and JSON, which is written after every row.

    Args:
      name: of the benchmark.
      doc: its docstring, for the help.
      cases: from the flags to what is compared.
      options: more flags, each with its default and help. A list takes several values of the type of its first.
      argv: the command line.
      pairs: how often the two sides take turns by default; with 0 nothing is timed.
      about: more values for the JSON, measured before the cases.
    """
    args = parse(doc, options, argv, pairs)
    try:
        return _measured(name, args, cases(args) if args.pairs else (), about)
    except KeyboardInterrupt:
        print("interrupted; the rows so far are written", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        sys.exit(refuse(error))


def _measured(
    name: str,
    args: argparse.Namespace,
    cases: Iterable[Case],
    about: Callable[[argparse.Namespace], Mapping[str, Any]],
) -> list[Row]:
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "only")}
    settings |= about(args)
    rows: list[Row] = []
    path = write(name, rows, args.out, **settings)
    for case in cases:
        sides = case.make() if args.only.lower() in case.name.lower() else None
        if sides is not None:
            pairs = max(round(args.pairs * case.part), min(args.pairs, 2))
            times = paired(*sides[:2], pairs, case.calls, case.clock, case.warm)
            extra = sides[2] if len(sides) > 2 else {}
            rows.append(row(case.name, (case.left, times[0]), (case.right, times[1]), case.target, **extra))
            print(table(rows[-1:]).splitlines()[1], flush=True)
            write(name, rows, args.out, **settings)
    print(f"\n{table(rows)}\nwrote {path}")
    return rows


def parse(
    doc: str | None, options: Mapping[str, tuple[Any, str]], argv: Sequence[str] | None, pairs: int
) -> argparse.Namespace:
    """The flags of a benchmark."""
    found = flags.Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--pairs", type=int, default=pairs, help="how often the two sides take turns")
    found.add_argument("--out", help="the JSON file to write")
    found.add_argument("--only", default="", help="rows whose name has this in it")
    for option, (default, text) in options.items():
        many = isinstance(default, (list, tuple))
        how: dict[str, Any] = {"nargs": "+", "type": type(default[0])} if many else {"type": type(default)}
        if isinstance(default, Names):
            how["choices"] = list(default)
        found.add_argument(f"--{option}", default=default, help=f"{text} ({default})", **how)
    args = found.parse_args(argv)
    if args.pairs < 0:
        found.error(f"--pairs={args.pairs} must not be negative")
    return args


def one_thread(module: str, argv: Sequence[str]) -> None:
    """Start the module anew with one thread for BLAS and for XLA, unless that is how it runs."""
    wanted = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    wanted["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, "-m", module, *argv], {**os.environ, **wanted})


def seconds(side: Side, clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    jax.block_until_ready(side())
    return clock() - start


def paired(
    left: Side,
    right: Side,
    pairs: int,
    calls: tuple[int, int] = (1, 1),
    clock: Callable[[], float] = time.perf_counter,
    warm: int = 2,
) -> tuple[np.ndarray, np.ndarray]:
    """Times of ``left`` and ``right`` taken in turns, each the mean of ``calls`` calls, after ``warm`` calls of each.

    The side that goes first changes from pair to pair.
    """
    sides = (left, right)
    for side in sides * warm:
        seconds(side)
    times = np.zeros((2, pairs))
    for pair in range(pairs):
        for i in (0, 1) if pair % 2 == 0 else (1, 0):
            times[i, pair] = np.mean([seconds(sides[i], clock) for _ in range(calls[i])])
    return times[0], times[1]


def row(name: str, left: tuple[str, np.ndarray], right: tuple[str, np.ndarray], target: str = "", **extra: Any) -> Row:
    """The comparison of two series of paired times. ``target`` is ``">= x"`` or ``"<= x"`` for the ratio."""
    a, b = left[1], right[1]
    ratios = b / a
    ratio, low, high = (float(x) for x in np.percentile(ratios, [50, 25, 75]))
    return Row(
        name, left[0], right[0],
        float(np.median(a)), _quartiles(a), float(np.median(b)), _quartiles(b),
        ratio, low, high, len(a), target, is_met(ratio, target), extra,
    )  # fmt: skip


def _quartiles(x: np.ndarray) -> tuple[float, float]:
    return float(np.percentile(x, 25)), float(np.percentile(x, 75))


def is_met(value: float, target: str) -> bool | None:
    if not target:
        return None
    sign, bound = target.split()
    return value >= float(bound) if sign == ">=" else value <= float(bound)


def table(rows: Sequence[Row]) -> str:
    """The rows as text: both sides in milliseconds with quartiles, and the ratio."""
    cells = [("what", "left", "ms [quartiles]", "right", "ms [quartiles]", "right / left", "target", "met")]
    for r in rows:
        cells.append(
            (
                r.name, r.left, _ms(r.left_s, r.left_quartiles), r.right, _ms(r.right_s, r.right_quartiles),
                f"{r.ratio:.3g} [{r.low:.3g}, {r.high:.3g}]", r.target, {True: "yes", False: "NO", None: ""}[r.met],
            )
        )  # fmt: skip
    return tables.aligned(cells, range(len(cells[0])))


def _ms(median: float, quartiles: tuple[float, float]) -> str:
    return f"{1e3 * median:.4g} [{1e3 * quartiles[0]:.4g}, {1e3 * quartiles[1]:.4g}]"


def write(name: str, rows: Sequence[Row], out: str | None, **settings: Any) -> Path:
    """Write the JSON, and say where."""
    path = Path(out or f"runs/benchmarks/{name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"benchmark": name, "settings": settings, "environment": environment()}
    record["rows"] = [dataclasses.asdict(r) for r in rows]
    write_file(path, json.dumps(record, indent=1) + "\n")
    return path
