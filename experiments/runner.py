"""One runner for all experiments: what is not measured yet is measured, a row at a time, and may stop at any time.

An experiment says which rows it wants and how one is made (:class:`Experiment`); the ways that it compares are named
functions (:class:`Way`). :func:`main` does the rest: the lock, the rows on disk, signals, errors, the exit code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
from tqdm import tqdm

from experiments import flags
from experiments.environment import command
from experiments.workdir import Lock, Record, Row, Rows, RunError

_KEPT = 16
"""Rows after which compiled programs are let go: each takes tens of memory maps, and Linux allows a process 65,530."""


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to a small network: what an experiment compares.

    Attributes:
      name: in the rows, the table and the picture.
      make: ``make(lab, seed, ...) -> tree``, from fresh or dense parameters of a lab's model, compressed or with zeros.
      told: ``told(lab)``, what tells this way from another of the same name, as :func:`describe` takes it.
      family: ways of one family have one colour.
    """

    name: str
    make: Callable[..., Any]
    told: Callable[[Any], Any] = lambda lab: None
    family: str = ""


def chosen(ways: Sequence[Way], only: str, flag: str = "config.only") -> list[Way]:
    """Those named in ``only``, which are joined by commas; all of them where it is empty.

    Raises:
      ValueError: for a name that none has.
    """
    names = [name.strip() for name in only.split(",") if name.strip()]
    known = {way.name: way for way in ways}
    for name in names:
        if name not in known:
            raise ValueError(f"{flag}: {name!r} is unknown; use some of {','.join(known)}")
    return [known[name] for name in names] or list(ways)


class Experiment(Protocol):
    """What the runner needs to know.

    Attributes:
      keys: the columns that say what a row measures.
      workdir: the folder of the run.
      setting: JSON values that decide the results, the ways under ``"ways"``.
    """

    keys: Sequence[str]
    workdir: Path
    setting: dict[str, Any]

    def todo(self) -> Iterable[Row]:
        """The keys of each row that is wanted, in order."""

    def measure(self, rows: Rows, **key: Any) -> Row:
        """What a row says beside its keys; ``rows`` are those that were measured before."""

    def line(self, row: Row) -> str:
        """A row in one line."""

    def finish(self, rows: list[Row]) -> tuple[str, Any]:
        """Write tables and pictures of the rows that are wanted; what is printed, and a summary for the record."""


class Interrupted(BaseException):
    """A signal asked the run to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Signals:
    """While in force, SIGTERM and Ctrl-C raise :class:`Interrupted`; where deferred, at the next :meth:`check`."""

    numbers = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received: int | None = None
        self._deferred = False

    def __enter__(self) -> Signals:
        self._old = {number: signal.signal(number, self._note) for number in self.numbers}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)

    def _note(self, number: int, _: Any) -> None:
        if self.received is not None or not self._deferred:
            raise Interrupted(number)
        self.received = number

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Within it a first signal waits for :meth:`check`, so that something can be saved before."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def check(self) -> None:
        """Raise if a signal came."""
        if self.received is not None:
            raise Interrupted(self.received)


def run(experiment: Experiment, overwrite: bool = False) -> str:
    """Make every row that is not there yet, then finish; returns what is to be printed.

    Raises:
      RunError: if the folder is in use, or holds another run.
    """
    with Lock(experiment.workdir):
        record = Record(experiment.workdir, experiment.setting, overwrite)
        rows = Rows(experiment.workdir / "results.jsonl", experiment.keys)
        try:
            return _measured(experiment, rows, record)
        except Interrupted:
            record.save()
            raise


def _measured(experiment: Experiment, rows: Rows, record: Record) -> str:
    todo = [dict(key) for key in experiment.todo()]
    there = sum(rows.find(**key) is not None for key in todo)
    print(f"{len(todo)} rows, {there} of them there, in {experiment.workdir}", flush=True)
    for number, key in enumerate(todo, 1):
        if rows.find(**key) is None:
            start = time.monotonic()
            row = {**key, **experiment.measure(rows, **key)}
            rows.add({**row, "seconds": round(time.monotonic() - start, 2)})
            tqdm.write(f"[{number}/{len(todo)}] {experiment.line(row)}, {time.monotonic() - start:.1f} s")
            sys.stdout.flush()
            if number % _KEPT == 0:
                jax.clear_caches()
    text, summary = experiment.finish([row for key in todo if (row := rows.find(**key)) is not None])
    record.save(finished=True, summary=summary)
    return text


def main(prepare: Callable[[Signals], Experiment], overwrite: bool = False) -> int:
    """Prepare an experiment, run it, print what it gives.

    Returns:
      The exit code: 0; 2 for anything wrong with flags, data or folder and for a full disk, after one line on stderr;
      128 + the signal's number if interrupted, after one line that says how to continue.
    """
    expected: tuple[type[Exception], ...] = (ValueError, OSError, ImportError)
    with Signals() as signals:
        try:
            experiment = prepare(signals)
            expected = (RunError, OSError)  # from here on any other is a fault of the code: its traceback is wanted
            print(f"\n{run(experiment, overwrite)}\n\nwritten to {experiment.workdir}")
        except Interrupted as stopped:
            print(f"interrupted by {stopped}; to continue: {command().replace(' --overwrite', '')}", file=sys.stderr)
            return 128 + stopped.number
        except (ValueError, OSError, ImportError) as error:
            if not isinstance(error, expected):
                raise
            return refuse(error)
    return 0


def of_config(
    doc: str | None,
    workdir: str,
    configs: Callable[[str], Any],
    build: Callable[[Any, str | None, str | None], Experiment],
    argv: Sequence[str] | None = None,
) -> int:
    """The command of an experiment that a config, ``--data_dir`` and ``--workdir`` decide; the exit code.

    Args:
      doc: of the command, for its help.
      workdir: where it writes by default, in words.
      configs: see :func:`experiments.flags.parse`.
      build: from the config, the folder of the data and the workdir.
      argv: the command line.
    """
    args, config = flags.parse(flags.parser(doc, workdir), configs, argv)
    return main(lambda signals: build(config, args.data_dir, args.workdir), args.overwrite)


def refuse(error: object) -> int:
    """Say what is wrong in one line on stderr; the exit code 2."""
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    return 2


def describe(x: Any, steps: int = 0) -> Any:
    """A stage, rule or method as plain JSON values; a schedule by its values at five points of so many steps.

    What is called with more than the step, such as a score, is told by its name.
    """
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        fields = {f.name: describe(getattr(x, f.name), steps) for f in dataclasses.fields(x)}
        return {"name": type(x).__name__, **fields}
    if callable(x) and len(inspect.signature(x).parameters) > 1:
        return getattr(x, "__name__", repr(x))
    if callable(x):
        return {"schedule": [round(float(x(steps * i // 4)), 6) for i in range(5)]}
    if isinstance(x, Mapping):
        return {str(key): describe(value, steps) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [describe(y, steps) for y in x]
    return x if isinstance(x, (str, int, float, bool, type(None))) else repr(x)
