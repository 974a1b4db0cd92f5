"""Static indices along an axis: those that only put its parts in another order, and which parts those are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Order = np.ndarray
"""For each position along an axis, the position that it is taken from."""


def is_permutation(index: Order, n: int) -> bool:
    """Whether every one of ``n`` positions is taken once."""
    return len(index) == n and bool((np.sort(index) == np.arange(n)).all())


def pieces(order: Order, sizes: Sequence[int]) -> list[tuple[int, Order]] | None:
    """Consecutive pieces as ``(start, order inside)``, or None if the sources of one have gaps."""
    found = []
    for part in np.split(order, np.cumsum(sizes)[:-1]):
        start = int(part.min())
        if int(part.max()) - start + 1 != len(part):
            return None
        found.append((start, part - start))
    return found


def factors(order: Order, sizes: Sequence[int]) -> list[Order] | None:
    """The order of each factor of a product whose factors are ordered one by one, or None."""
    found, rest = [], order
    for n in sizes[:-1]:
        table = rest.reshape(n, -1)
        outer, inner = np.divmod(table, table.shape[1])
        if (outer != outer[:, :1]).any() or (inner != inner[:1]).any():
            return None
        found.append(outer[:, 0])
        rest = inner[0]
    return [*found, rest]


def turned(order: Order, sizes: Sequence[int]) -> int | None:
    """How many factors of a product go behind the others, which come first then, or None."""
    for k in range(1, len(sizes)):
        table = np.arange(len(order)).reshape(math.prod(sizes[:k]), -1)
        if (order == table.T.reshape(-1)).all():
            return k
    return None
