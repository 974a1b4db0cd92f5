"""What a measurement was made with: versions, commit, device, command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("jcompress", "jax", "jaxlib", "flax", "optax", "numpy", "scikit-learn")


def environment() -> dict[str, Any]:
    """Versions, commit, machine and device, as JSON values."""
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "jax": jax.__version__,
        "commit": commit(),
        "backend": devices[0].platform,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "platform": platform.platform(),
        "processor": _processor(),
        "date": time.strftime("%Y-%m-%d"),
    }


def version(name: str) -> str | None:
    """Of an installed package, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else f"{os.cpu_count()} x {platform.machine()}"


def commit() -> str | None:
    """The commit of this checkout, marked where files have changed since; None outside a checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def command() -> str:
    """The command that started this process, as one would type it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["-m", spec.name.removesuffix(".__main__")] if spec is not None else [sys.argv[0]]
    return shlex.join(["python", *program, *sys.argv[1:]])
