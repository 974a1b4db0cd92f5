"""The folder of a run: rows on disk, the record of what they are of, and the lock that keeps a second run out."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import jax

from experiments.environment import command, environment
from jcompress.io import inspect, load, save

PyTree = Any
Row = dict[str, Any]


class RunError(ValueError):
    """The folder cannot be used as asked. The message says how to mend it."""


def write(path: Path, text: str) -> None:
    """Write a file in one piece: a crash or a full disk leaves the old one."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with scratch.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def keep(folder: str | Path, name: str, record: Mapping[str, Any]) -> None:
    """Write a record that is made in one go as JSON."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    write(Path(folder) / f"{name}.json", json.dumps(record, indent=1) + "\n")


class Rows:
    """Measurements in a file of JSON lines, appended as they are made, one for each thing measured.

    Args:
      path: the file.
      keys: the columns that say what a row measures. Of several rows of the same, the first counts.
    """

    def __init__(self, path: Path, keys: Sequence[str]) -> None:
        self.path, self.keys = path, tuple(keys)
        self._rows: dict[tuple, Row] = {}
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        for i, line in enumerate(lines):
            if i == len(lines) - 1 and not line.endswith("\n"):
                write(path, "".join(lines[:-1]))  # torn: the process ended while it was written
                break
            try:
                row = json.loads(line)
                self._rows.setdefault(self._key(row), row)
            except (json.JSONDecodeError, TypeError, KeyError):
                expected = ", ".join(self.keys)
                raise RunError(
                    f"{path}: line {i + 1} is no JSON object with {expected}; mend it, or start over with --overwrite"
                ) from None

    def _key(self, row: Mapping[str, Any]) -> tuple:
        return tuple(row[key] for key in self.keys)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Any:
        return iter(self._rows.values())

    def find(self, **key: Any) -> Row | None:
        """The row that measures this, or None."""
        return self._rows.get(self._key(key))

    def add(self, row: Row) -> None:
        """Append a row; where the disk is full, the file stays as it was."""
        line = (json.dumps(row) + "\n").encode()
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(file).st_size
            try:
                if os.write(file, line) < len(line):
                    raise OSError(28, "No space left on device", str(self.path))
                os.fsync(file)
            except OSError:
                os.ftruncate(file, size)
                raise
        finally:
            os.close(file)
        self._rows[self._key(row)] = row


class Lock:
    """While held, no other process can hold the lock of this folder. One that dies lets go of it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: IO[str] | None = None

    def __enter__(self) -> Lock:
        self._folder.mkdir(parents=True, exist_ok=True)
        file = (self._folder / ".lock").open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            other = file.read().strip()
            file.close()
            raise RunError(
                f"{self._folder} is in use by another run{f' (process {other})' if other else ''}; wait until it has "
                "ended, or give another --workdir"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        self._file = file
        return self

    def __exit__(self, *_: Any) -> None:
        if self._file is not None:
            self._file.close()


class Checkpoint:
    """The training state of the stage in progress, in one file, written when a signal comes and now and then.

    The start of the stage is kept beside the state: compressed anew it gives the structure, and the saved arrays
    fill it, bit for bit.

    Args:
      path: the file.
      signals: :class:`experiments.runner.Signals`.
      seconds: between two times that it is written.
    """

    def __init__(self, path: Path, signals: Any, seconds: float = 60.0) -> None:
        self.path, self.signals, self._seconds = path, signals, seconds

    def after(self, where: Row, start: PyTree) -> Callable[[PyTree, int], None]:
        """What a training loop calls after each step; raises ``Interrupted`` once a signal came."""
        last = time.monotonic()

        def after(state: PyTree, done: int) -> None:
            nonlocal last
            if self.signals.received is None and time.monotonic() - last < self._seconds:
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save(self.path, {"start": start, "leaves": jax.tree.leaves(state)}, metadata={**where, "step": done})
            last = time.monotonic()
            self.signals.check()

        return after

    def stage(self, where: Row) -> tuple[int, PyTree, list[Any]] | None:
        """The stage in progress, where it started and the saved arrays, if the checkpoint is of this measurement."""
        if not self.path.exists():
            return None
        found = inspect(self.path)["metadata"]
        if any(found.get(key) != value for key, value in where.items()):
            return None
        tree = load(self.path)
        return found["stage"], tree["start"], tree["leaves"]


class Record:
    """``record.json``: what was measured, with what, by which command, for how long.

    Args:
      folder: of the run.
      setting: JSON values that decide the results. A run of another setting is refused, but for its ``"ways"``, of
        which each is compared to the one of its name: ways may be added.
      overwrite: whether to delete an earlier run.

    Raises:
      RunError: if the folder holds a run of another setting.
    """

    def __init__(self, folder: Path, setting: Mapping[str, Any], overwrite: bool = False) -> None:
        self.path, self._begun = folder / "record.json", time.time()
        if overwrite:
            clear(folder)
        setting, old = json.loads(json.dumps(setting)), self._read()
        ways = setting.get("ways", {})
        if old is not None:
            known = old["setting"].get("ways", {})
            both = known.keys() & ways.keys()
            before = old["setting"] | {"ways": {name: known[name] for name in both}}
            changed = differences(before, setting | {"ways": {name: ways[name] for name in both}})
            if changed:
                raise RunError(
                    f"{folder} holds a run of another setting ({'; '.join(changed[:3])}); give another --workdir, or "
                    "--overwrite to delete what is there"
                )
            setting |= {"ways": known | ways}
        self._runs = (old or {}).get("runs", [])
        self.content = {
            "fingerprint": hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:16],
            "setting": setting,
            "command": command(),
            "environment": environment(),
        }
        self.save()

    def _read(self) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        try:
            return json.loads(self.path.read_text())
        except json.JSONDecodeError:
            raise RunError(f"{self.path} is no JSON; start over with --overwrite") from None

    def save(self, **more: Any) -> None:
        """Write the record; wall time is the sum over the pieces of an interrupted run."""
        self.content |= more
        piece = {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(self._begun))}
        runs = [*self._runs, piece | {"seconds": round(time.time() - self._begun, 1)}]
        seconds = round(sum(run["seconds"] for run in runs), 1)
        write(self.path, json.dumps(self.content | {"runs": runs, "wall_seconds": seconds}, indent=1) + "\n")


def clear(folder: Path) -> None:
    """Delete what a run writes, and nothing else."""
    files = ("record.json", "results.jsonl", "metrics.jsonl", "model.jc")
    for name in (*files, "table.txt", "table.md", "pareto.png", "curve.png"):
        (folder / name).unlink(missing_ok=True)
    for name in ("models", "checkpoint", "checkpoints", "tensorboard", "rows"):
        shutil.rmtree(folder / name, ignore_errors=True)


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Where two JSON values differ, as ``path: old -> new``."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted({*old, *new})
        return [d for k in keys for d in differences(old.get(k), new.get(k), f"{path}.{k}" if path else k)]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [d for i in range(len(old)) for d in differences(old[i], new[i], f"{path}.{i}")]
    return [] if old == new else [f"{path}: {_short(old)} -> {_short(new)}"]


def _short(x: Any) -> str:
    text = json.dumps(x)
    return text if len(text) <= 60 else text[:57] + "..."
