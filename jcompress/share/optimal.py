"""The exact optimum of k-means in one dimension. Pure NumPy, on the host."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Cost = Callable[[np.ndarray, np.ndarray], np.ndarray]


def optimal_codebook(values: np.ndarray, clusters: int) -> np.ndarray:
    """The sorted float32 codebook of ``clusters`` values with the least total squared error.

    In one dimension optimal clusters are intervals, so the best cost of the first ``j`` values in ``k`` clusters is
    ``D_k(j) = min_i D_{k-1}(i) + cost(i, j)``. The best ``i`` grows with ``j`` (the costs satisfy the quadrangle
    inequality), so each row is found by divide and conquer in ``O(n log n)`` (Wang & Song 2011; Gronlund et al.
    2017, arXiv:1701.07204).

    Args:
      values: float array; equal values are treated as one with a weight.
      clusters: how many; where there are fewer distinct values, the largest repeats.
    """
    points, counts = np.unique(np.asarray(values, np.float64).reshape(-1), return_counts=True)
    if points.size <= clusters:
        filled = points if points.size else np.zeros(1)
        return np.concatenate([filled, np.full(clusters - filled.size, filled[-1])]).astype(np.float32)
    shifted = points - np.average(points, weights=counts)
    sums = [np.concatenate([[0.0], np.cumsum(counts * shifted**power)]) for power in range(3)]

    def cost(i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """The squared error of one cluster of the points ``i`` to ``j - 1``."""
        weight, first, second = (s[j] - s[i] for s in sums)
        return np.maximum(second - first**2 / np.maximum(weight, 1e-300), 0.0)

    n = points.size
    best = cost(np.zeros(n + 1, np.int64), np.arange(n + 1))
    cuts = []
    for k in range(2, clusters + 1):
        best, cut = _next_row(best, cost, n, k)
        cuts.append(cut)
    edges = [n]
    for cut in reversed(cuts):
        edges.append(int(cut[edges[-1]]))
    bounds = np.array([*edges, 0][::-1])
    means = np.diff(sums[1][bounds]) / np.diff(sums[0][bounds])
    return (means + (points - shifted)[0]).astype(np.float32)


def _next_row(best: np.ndarray, cost: Cost, n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """``D_k`` and its cuts from ``D_{k-1}``: all midpoints of one depth of the recursion at a time."""
    row, cut = np.full(n + 1, np.inf), np.zeros(n + 1, np.int64)
    low, high = np.array([k]), np.array([n])
    first, last = np.array([k - 1]), np.array([n - 1])
    while low.size:
        middle = (low + high) // 2
        starts, ends = first, np.minimum(last, middle - 1)
        at, value = _segment_argmin(best, cost, starts, ends, middle)
        row[middle], cut[middle] = value, at
        low, high = np.concatenate([low, middle + 1]), np.concatenate([middle - 1, high])
        first, last = np.concatenate([first, at]), np.concatenate([at, last])
        open_ = low <= high
        low, high, first, last = low[open_], high[open_], first[open_], last[open_]
    return row, cut


def _segment_argmin(
    best: np.ndarray, cost: Cost, starts: np.ndarray, ends: np.ndarray, middle: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For each segment of candidate cuts ``starts..ends``, the cut of least cost for the point ``middle``."""
    lengths = ends - starts + 1
    offsets = np.cumsum(lengths) - lengths
    candidates = np.arange(lengths.sum()) - np.repeat(offsets - starts, lengths)
    values = best[candidates] + cost(candidates, np.repeat(middle, lengths))
    least = np.minimum.reduceat(values, offsets)
    hits = np.flatnonzero(values == np.repeat(least, lengths))
    return candidates[hits[np.searchsorted(hits, offsets)]], least
