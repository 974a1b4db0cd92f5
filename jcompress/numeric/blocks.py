"""Arrays as rows of blocks of their last axes."""

from __future__ import annotations

import math
from typing import Any


def blocked(x: Any, block: tuple[int, ...]) -> Any:
    """The blocks of an array as rows: (..., n_1, ..., n_m, entries of a block).

    Args:
      x: array (..., n_1 * block_1, ..., n_m * block_m).
      block: the lengths of a block along the last m axes.
    """
    if not block:
        return x
    m, lead = len(block), x.shape[: x.ndim - len(block)]
    counts = [n // b for n, b in zip(x.shape[-m:], block, strict=True)]
    split = x.reshape(*lead, *(n for pair in zip(counts, block, strict=True) for n in pair))
    front = len(lead)
    order = (*range(front), *range(front, front + 2 * m, 2), *range(front + 1, front + 2 * m, 2))
    return split.transpose(order).reshape(*lead, *counts, math.prod(block))


def unblocked(rows: Any, block: tuple[int, ...]) -> Any:
    """The inverse of :func:`blocked`."""
    if not block:
        return rows
    m = len(block)
    front = rows.ndim - 1 - m
    lead, counts = rows.shape[:front], rows.shape[front:-1]
    order = (*range(front), *(front + i + j for i in range(m) for j in (0, m)))
    whole = rows.reshape(*lead, *counts, *block).transpose(order)
    return whole.reshape(*lead, *(n * b for n, b in zip(counts, block, strict=True)))
