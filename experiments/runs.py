"""The folder of a run: its record, its results, its checkpoint, and what happens when it is interrupted."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

PyTree = Any


class RunError(ValueError):
    """The folder cannot be used as asked. The message says how to mend it."""


class Interrupted(Exception):  # noqa: N818  (not an error)
    """Training stopped at a signal, after a checkpoint."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Signals:
    """While in force, SIGTERM and Ctrl-C are noted, not obeyed; a second one ends the process at once."""

    numbers = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> Signals:
        self._old = {number: signal.signal(number, self._note) for number in self.numbers}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)

    def _note(self, number: int, _: Any) -> None:
        self.received = number
        for other in self.numbers:
            signal.signal(other, signal.SIG_DFL)

    def check(self) -> None:
        """Raise if a signal came."""
        if self.received is not None:
            raise Interrupted(self.received)


def write(path: Path, text: str) -> None:
    """Write a file in one piece: a crash leaves the old one."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    with scratch.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


class Results:
    """A list of measurements in a file of JSON lines, one line a measurement, appended as it is made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        for i, line in enumerate(lines):
            if i == len(lines) - 1 and not line.endswith("\n"):
                write(path, "".join(lines[:-1]))  # torn: the process ended while it was written
                break
            try:
                self.rows.append(json.loads(line))
            except json.JSONDecodeError:
                raise RunError(f"{path}: line {i + 1} is no JSON; mend it, or start over with --overwrite") from None

    def add(self, row: Mapping[str, Any]) -> None:
        self.rows.append(dict(row))
        line = (json.dumps(row) + "\n").encode()
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def find(self, **keys: Any) -> dict[str, Any] | None:
        return next((row for row in self.rows if all(row.get(k) == v for k, v in keys.items())), None)


class Record:
    """``record.json``: all that is needed to say what a run was, and to tell another run from this one."""

    def __init__(self, workdir: Path, setting: Mapping[str, Any], overwrite: bool = False) -> None:
        self.path, self._begun = workdir / "record.json", time.time()
        if overwrite:
            clear(workdir)
        old = self._read()
        if old is not None:
            changed = differences(old["setting"], json.loads(json.dumps(setting)))
            if changed:
                raise RunError(
                    f"{workdir} holds a run of another setting ({'; '.join(changed[:3])}); give another --workdir, or "
                    "--overwrite to delete what is there"
                )
        workdir.mkdir(parents=True, exist_ok=True)
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


def clear(workdir: Path) -> None:
    """Delete what a run writes, and nothing else."""
    for name in ("record.json", "results.jsonl", "table.txt", "table.md", "pareto.png"):
        (workdir / name).unlink(missing_ok=True)
    for name in ("models", "checkpoint"):
        shutil.rmtree(workdir / name, ignore_errors=True)


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


def command() -> str:
    """The command that started this process, as one would type it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["-m", spec.name] if spec is not None else [sys.argv[0]]
    return shlex.join(["python", *program, *sys.argv[1:]])


def environment() -> dict[str, Any]:
    """Versions, commit and device."""
    packages = ("jcompress", "jax", "jaxlib", "flax", "optax", "numpy", "scikit-learn")
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "commit": commit(),
        "device": {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)},
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of this checkout, marked where files have changed since; None outside a checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
