"""The order of the modes of a tensor train, by the singular values of all unfoldings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from jcompress.factorize.rank_choice import Choice

Unfoldings = dict[int, list[np.ndarray]]
"""By the bits of the modes of its rows: the squared singular values of a layer's unfolding, falling; one a layer."""

Costs = Callable[[int], float]


@dataclasses.dataclass(frozen=True)
class Ordered:
    """An order of the modes, and the rank of each bond.

    Attributes:
      order: of the modes.
      ranks: of the bonds between them, none larger than the modes before it can use.
    """

    order: tuple[int, ...]
    ranks: list[int]


def unfoldings(layers: Sequence[np.ndarray]) -> Unfoldings:
    """Those of every part of the modes, from the eigenvalues of the Gram matrix of the smaller side.

    Args:
      layers: arrays of one shape, an axis for each mode.
    """
    ndim, found = layers[0].ndim, {}
    for part in range(1, 2**ndim - 1, 2):  # those with the first mode; the others are their transposes
        rows = [i for i in range(ndim) if part >> i & 1]
        columns = [i for i in range(ndim) if not part >> i & 1]
        found[part] = [_squares(w.astype(np.float64).transpose(rows + columns), len(rows)) for w in layers]
        found[2**ndim - 1 - part] = found[part]
    return found


def _squares(w: np.ndarray, rows: int) -> np.ndarray:
    matrix = w.reshape(math.prod(w.shape[:rows]), -1)
    matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    return np.maximum(np.linalg.eigvalsh(matrix @ matrix.T)[::-1], 0)


def of_choice(sizes: Sequence[int], known: Unfoldings, choice: Choice) -> Ordered:
    """The fewest numbers at the ranks that a bound of the error, or the evidence, gives each unfolding."""
    ranks = {part: max(_rank(x, part, sizes, choice) for x in squares) for part, squares in known.items()}
    return _ordered(sizes, known, ranks)


def of_rank(sizes: Sequence[int], known: Unfoldings, rank: int) -> Ordered:
    """The least bound of the error, the sum of what all unfoldings leave, at one rank."""
    ranks = {part: min(rank, len(squares[0])) for part, squares in known.items()}
    return _ordered(sizes, known, ranks, by_error=True)


def of_numbers(sizes: Sequence[int], known: Unfoldings, most: float) -> Ordered:
    """The least error of the worst unfolding whose train has at most so many numbers; ranks of 1 where none has."""
    left = {part: [np.append(np.cumsum(x[::-1])[::-1][1:], 0) for x in squares] for part, squares in known.items()}
    limits = np.unique(np.concatenate([x for tails in left.values() for x in tails]))

    def at(place: int) -> Ordered:
        ranks = {p: max(1 + int((x > limits[place]).sum()) for x in tails) for p, tails in left.items()}
        return _ordered(sizes, known, ranks)

    low, high = 0, len(limits) - 1
    while low < high:
        middle = (low + high) // 2
        fits = numbers(sizes, at(middle)) <= most
        low, high = (low, middle) if fits else (middle + 1, high)
    return at(low)


def numbers(sizes: Sequence[int], found: Ordered) -> int:
    """How many numbers the cores have."""
    edges, own = [1, *found.ranks, 1], [sizes[i] for i in found.order]
    return sum(a * n * b for a, n, b in zip(edges, own, edges[1:], strict=False))


def _rank(squares: np.ndarray, part: int, sizes: Sequence[int], choice: Choice) -> int:
    rows = math.prod(n for i, n in enumerate(sizes) if part >> i & 1)
    return choice.rank(np.sqrt(squares), (rows, math.prod(sizes) // rows), steps=len(sizes) - 1)


def _ordered(sizes: Sequence[int], known: Unfoldings, ranks: dict[int, int], by_error: bool = False) -> Ordered:
    """The best of all orders: what a mode costs depends on those before it, whatever their order."""
    whole = 2 ** len(sizes) - 1
    ranks = {0: 1, whole: 1, **ranks}
    left = {part: sum(float(x[ranks[part] :].sum()) for x in squares) for part, squares in known.items()}
    # By part, of all modes that are not in it: the cost of the best order, and its first mode.
    best: dict[int, tuple[float, float, int]] = {whole: (0, 0, 0)}
    for part in reversed(range(whole)):
        options = []
        for mode in (i for i in range(len(sizes)) if not part >> i & 1):
            after = part | 1 << mode
            stored, error = ranks[part] * sizes[mode] * ranks[after], left.get(after, 0.0)
            first, second = (error, stored) if by_error else (stored, error)
            options.append((best[after][0] + first, best[after][1] + second, mode))
        best[part] = min(options)
    order: list[int] = []
    bonds: list[int] = []
    part = 0
    while part != whole:
        mode = best[part][2]
        part |= 1 << mode
        # No more than the directions that the cores before leave.
        bonds.append(min(ranks[part], (bonds[-1] if bonds else 1) * sizes[mode]))
        order.append(mode)
    return Ordered(tuple(order), bonds[:-1])
