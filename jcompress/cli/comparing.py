"""``jcompress diff`` and ``jcompress report``: two files beside one another."""

from __future__ import annotations

import argparse
import math
from typing import Any

import numpy as np

import jcompress as jc
from jcompress import io
from jcompress.io import reading
from jcompress_command import DIFFERENT, SAME, say, table


def diff(given: argparse.Namespace) -> int:
    """Print the error of every array, one pair at a time in memory; 1 if two differ, or one is missing."""
    before, after = io.read_tensors(given.before), io.read_tensors(given.after)
    rows: list[tuple[str, ...]] = [("name", "shape", "error", "largest", "")]
    status = SAME
    for name in [*before, *(name for name in after if name not in before)]:
        row, error = _compared(name, before, after)
        rows.append(row)
        if not error <= given.tolerance:
            status = DIFFERENT
    say(table(rows, right=(2, 3)))
    return status


def _compared(name: str, before: io.Tensors, after: io.Tensors) -> tuple[tuple[str, ...], float]:
    """A row, and the relative error; infinite where there is none."""
    told = [x.shapes[name] for x in (before, after) if name in x]
    shape = " ".join(dict.fromkeys("x".join(map(str, x.shape)) or "scalar" for x in told))
    if len(told) < 2:
        return (name, shape, "-", "-", f"only in the {'first' if name in before else 'second'}"), math.inf
    if told[0].shape != told[1].shape:
        return (name, shape, "-", "-", "of other shapes"), math.inf
    a, b = _wide(before[name]), _wide(after[name])
    same_nan = np.isnan(a) & np.isnan(b)
    with np.errstate(invalid="ignore", over="ignore"):
        gap = np.where(same_nan | (a == b), 0, np.abs(a - b))
        norm, largest = float(np.linalg.norm(np.where(np.isfinite(a), a, 0))), float(gap.max(initial=0))
        error = 0.0 if largest == 0 else float(np.linalg.norm(gap)) / norm if norm else math.inf
    note = "" if told[0].dtype == told[1].dtype else f"{told[0].dtype}, {told[1].dtype}"
    return (name, shape, f"{error:.3g}", f"{largest:.3g}", note), error


def _wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.complex128 if x.dtype.kind == "c" else np.float64)


def report(given: argparse.Namespace) -> int:
    """Print the report of a compressed file beside what it was made of."""
    after: Any = jc.load(given.after) if reading.kind_of(given.after) == "jcompress" else _whole(given.after)
    say(str(jc.report(_whole(given.before), after)))
    return SAME


def _whole(path: str) -> Any:
    from jcompress.io.tensors import nested

    tensors = io.read_tensors(path)
    return nested({name: tensors[name] for name in tensors})
