"""Latency with its spread."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Latency:
    """Seconds a call took, over ``n`` calls.

    Attributes:
      median: the middle one.
      low: the 10th percentile.
      high: the 90th percentile.
      n: how many were timed.

    Example:
      >>> from jcompress import measure
      >>> measure.Latency.of([0.001, 0.002, 0.009]).median
      0.002
    """

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Latency:
        """Summarize timed calls.

        Example:
          >>> from jcompress import measure
          >>> print(measure.Latency.of([0.003, 0.001, 0.002]))
          2.000 ms (1.200 to 2.800, n=3)
        """
        low, median, high = np.percentile(np.asarray(seconds, np.float64), [10, 50, 90]).tolist()
        return cls(median, low, high, len(seconds))

    def __str__(self) -> str:
        return f"{1e3 * self.median:.3f} ms ({1e3 * self.low:.3f} to {1e3 * self.high:.3f}, n={self.n})"


def latency(fn: Callable[..., Any], *args: Any, repeats: int = 50, warmup: int = 3) -> Latency:
    """Time ``fn(*args)``, waiting each time until its results are ready.

    Args:
      fn: what to time. A jitted function compiles during the warm-up.
      *args: its arguments. Put them on the device first, or the transfer is timed too.
      repeats: timed calls, at least 1.
      warmup: calls before those, not timed.

    Returns:
      A :class:`Latency`, in seconds.

    Raises:
      ValueError: for fewer than 1 repeat, or a negative warm-up.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jcompress import measure
      >>> measure.latency(jax.jit(jnp.sin), jnp.ones(8), repeats=5).n
      5
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"latency: found repeats={repeats} and warmup={warmup}; expected at least 1 and at least 0")
    for _ in range(warmup):
        jax.block_until_ready(fn(*args))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(fn(*args))
        seconds.append(time.perf_counter() - start)
    return Latency.of(seconds)
