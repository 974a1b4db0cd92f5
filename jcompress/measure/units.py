"""Sizes as people read them."""

from __future__ import annotations

import math


def in_thousands(count: float) -> str:
    """A count in three digits, with k, M, G, T, P.

    Example:
      >>> from jcompress.measure.units import in_thousands
      >>> in_thousands(64), in_thousands(2_359_296)
      ('64', '2.36M')
    """
    power = next((i for i in range(6) if count < 999.5 * 1000**i), 5)
    return f"{count / 1000**power:.3g}{['', 'k', 'M', 'G', 'T', 'P'][power]}"


def in_bytes(count: float) -> str:
    """A size in decimal units; below 1000, whole bytes, rounded up.

    Example:
      >>> from jcompress.measure.units import in_bytes
      >>> in_bytes(12.5), in_bytes(44_190)
      ('13 B', '44.2 kB')
    """
    if count < 1000:
        return f"{math.ceil(count)} B"
    power = next((i for i in (1, 2, 3) if count < 999.95 * 1000**i), 4)
    return f"{count / 1000**power:.1f} {' kMGT'[power]}B"
