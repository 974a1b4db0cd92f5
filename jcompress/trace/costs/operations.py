"""Operations of one equation, counted as XLA's cost analysis counts them: plain ones, and transcendental ones apart."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from jax.extend import core as jax_core

Count = Callable[[jax_core.JaxprEqn], tuple[int, int]]
"""Floating-point or integer operations of an equation, and transcendental ones."""


def _size(v: Any) -> int:
    return math.prod(v.aval.shape)


def _made(eqn: jax_core.JaxprEqn) -> int:
    """The entries of all results."""
    return sum(map(_size, eqn.outvars))


def _read(eqn: jax_core.JaxprEqn) -> int:
    """The entries of the first operand."""
    return _size(eqn.invars[0]) if eqn.invars else 0


def each(plain: int = 1, transcendental: int = 0) -> Count:
    """So many for each entry of the results; functions that XLA writes out as polynomials take many."""
    return lambda eqn: (plain * _made(eqn), transcendental * _made(eqn))


ONE = each()
NONE = each(0)
TRANSCENDENTAL = each(0, 1)
UNKNOWN = each()
"""One for each entry of the results, for want of better: what is counted so is named."""


def power(eqn: jax_core.JaxprEqn) -> tuple[int, int]:
    """Products of a power by repeated squaring, and a division."""
    y = abs(eqn.params["y"])
    return (max(y.bit_length() - 1, 0) + max(y.bit_count() - 1, 0) + (eqn.params["y"] < 0)) * _made(eqn), 0


def window(eqn: jax_core.JaxprEqn) -> tuple[int, int]:
    """All but one of each window."""
    sizes = eqn.params.get("window_dimensions", ())
    return (math.prod(sizes) - 1) * _made(eqn), 0


def reduction(eqn: jax_core.JaxprEqn) -> tuple[int, int]:
    """One for each entry that goes."""
    return max(_read(eqn) - _made(eqn), 0), 0


def extremum(eqn: jax_core.JaxprEqn) -> tuple[int, int]:
    """Nine for each entry that goes, of an index and its value."""
    return 9 * (_read(eqn) - _made(eqn)), 0


def order(eqn: jax_core.JaxprEqn) -> tuple[int, int]:
    """N log n."""
    n = _read(eqn)
    return n * max(math.ceil(math.log2(max(n, 1))), 1), 0


def updates(eqn: jax_core.JaxprEqn) -> tuple[int, int]:
    """One for each entry that is written."""
    return _size(eqn.invars[2]), 0


def fourier(eqn: jax_core.JaxprEqn) -> tuple[int, int]:
    """Eight, four multiply-adds, for each entry and each power of two in a transform's length."""
    return 8 * _read(eqn) * math.prod(n.bit_length() - 1 for n in eqn.params["fft_lengths"]), 0


def conversion(eqn: jax_core.JaxprEqn) -> tuple[int, int]:
    """One for each entry; a complex number is made of two and costs nothing, as a padding value is."""
    made: Any = eqn.outvars[0].aval
    is_made = made.dtype.kind == "c" and not made.shape
    return (0 if is_made else _made(eqn)), 0
