"""What tells two plans apart: schedules by their values, arrays by their contents, the rest as methods print it."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jcompress.io.manifest import StorageError

STEPS: tuple[int, ...] = (
    0,
    1,
    2,
    3,
    5,
    8,
    13,
    21,
    34,
    55,
    89,
    100,
    144,
    233,
    377,
    610,
    1_000,
    1_597,
    2_584,
    4_181,
    6_765,
)
STEPS += (6_765, 10_000, 17_711, 28_657, 46_368, 75_025, 100_000, 196_418, 317_811, 514_229, 1_000_000, 10_000_000)
"""The steps at which schedules are compared."""

Values = Mapping[str, Any]


def texts(plan: Mapping[str, Any]) -> dict[str, str]:
    """Each method as it prints itself, without addresses in memory."""
    return {path: re.sub(r" at 0x[0-9a-f]+", "", repr(method)) for path, method in plan.items()}


def values(plan: Mapping[str, Any]) -> dict[str, Values]:
    """``{path: {hyperparameter: values}}`` of schedules and arrays, which do not print all that they are."""
    known: dict[int, Values] = {}
    for method in plan.values():
        if id(method) not in known:
            known[id(method)] = {name: _value(x) for name, x in _hyperparameters(method, "")}
    return {path: known[id(method)] for path, method in plan.items() if known[id(method)]}


def _hyperparameters(x: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Schedules, arrays and functions anywhere in a method."""
    inner: Any = []
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        inner = [(field.name, getattr(x, field.name)) for field in dataclasses.fields(x)]
    elif isinstance(x, (list, tuple)):
        inner = enumerate(x)
    elif isinstance(x, Mapping):
        inner = x.items()
    elif isinstance(x, (jax.Array, np.ndarray)) or (name and callable(x)):
        yield name, x
    for key, y in inner:
        yield from _hyperparameters(y, f"{name}.{key}" if name else str(key))


def _value(x: Any) -> Any:
    if callable(x):
        try:
            return [np.asarray(x(step), np.float64).reshape(-1).tolist() for step in STEPS]
        except Exception:  # no schedule: a function of something else, which only its name tells
            return f"{getattr(x, '__module__', '')}.{getattr(x, '__qualname__', type(x).__qualname__)}"
    array = np.asarray(x)
    return f"{array.dtype}{list(array.shape)} {hashlib.blake2b(array.tobytes(), digest_size=8).hexdigest()}"


def compare(found: Mapping[str, Values], wanted: Mapping[str, Values]) -> None:
    """Raise if a hyperparameter differs; numbers of schedules may differ by the rounding of another machine.

    Raises:
      StorageError: the message names the path, the hyperparameter and the step.
    """
    for path in [*found, *wanted]:
        old, new = found.get(path, {}), wanted.get(path, {})
        for name in [*old, *new]:
            _compare_one(f"{path}: found {name}", old.get(name), new.get(name))


def _compare_one(what: str, old: Any, new: Any) -> None:
    hint = "build the plan as it was when it was saved"
    if isinstance(old, list) and isinstance(new, list):
        for step, a, b in zip(STEPS, old, new, strict=False):
            if len(a) != len(b) or not np.allclose(a, b, rtol=1e-5, atol=1e-7, equal_nan=True):
                raise StorageError(f"{what} = {_short(a)} at step {step} in the plan, expected {_short(b)}; {hint}")
    elif old != new:
        raise StorageError(f"{what} = {_short(old)} in the plan, expected {_short(new)}; {hint}")


def _short(x: Any) -> str:
    if isinstance(x, list) and len(x) == 1:
        return f"{x[0]:.6g}" if isinstance(x[0], float) else "a schedule"
    return "a schedule" if isinstance(x, list) else str(x)
