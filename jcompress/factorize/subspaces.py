"""Leading subspaces, and ranks from shares of the numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

_HIGH = jax.lax.Precision.HIGHEST


def leading(matrix: jax.Array, rank: int) -> jax.Array:
    """Orthonormal columns (m, rank) that span the leading left singular vectors of a float32 (m, n).

    From the eigenvectors of the smaller Gram matrix, which squares what rounding makes of small singular values, and
    one power step, which takes that back: a subspace that holds the matrix is found to rounding.
    """
    m, n = matrix.shape
    if not matrix.size:
        return jnp.eye(m, rank, dtype=matrix.dtype)
    if m <= n:
        start = _eigenvectors(jnp.matmul(matrix, matrix.T, precision=_HIGH), rank)
    else:
        right = _eigenvectors(jnp.matmul(matrix.T, matrix, precision=_HIGH), min(rank, n))
        start = jnp.matmul(matrix, right, precision=_HIGH)
    if start.shape[1] < rank:  # more columns than the matrix has directions: any others
        start = jnp.concatenate([start, jnp.eye(m, rank - start.shape[1], dtype=matrix.dtype)], axis=1)
    back = jnp.matmul(matrix.T, jnp.linalg.qr(start)[0], precision=_HIGH)
    moved = jnp.matmul(matrix, back, precision=_HIGH)
    # What the matrix does not reach stays as it was, so that the columns stay independent.
    size = jnp.linalg.norm(moved, axis=0)
    dead = size <= size.max() * 1e-6
    return jnp.linalg.qr(jnp.where(dead, start, moved / jnp.where(dead, 1, size)))[0]


def _eigenvectors(gram: jax.Array, rank: int) -> jax.Array:
    return jnp.linalg.eigh(gram)[1][:, ::-1][:, :rank]


def unfolded(w: jax.Array, axes: Sequence[int]) -> jax.Array:
    """The matrix of some axes, in their order, by all others."""
    rest = [i for i in range(w.ndim) if i not in axes]
    return w.transpose(*axes, *rest).reshape(math.prod(w.shape[i] for i in axes), -1)


def is_share(rank: Any) -> bool:
    """Whether a rank is a share of the numbers, in (0, 1)."""
    return isinstance(rank, float) and 0 < rank < 1


def largest(numbers: Callable[[int], int], most: int, limit: float) -> int:
    """The largest number from 1 to ``most`` at which no more numbers than the limit are kept, or 1."""
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if numbers(middle) <= limit else (low, middle - 1)
    return low


def check_rank(name: str, rank: Any) -> None:
    """Raise unless a rank is a positive whole number or a share in (0, 1)."""
    whole = isinstance(rank, int) and not isinstance(rank, bool) and rank > 0
    if not whole and not is_share(rank):
        raise ValueError(f"{name}: rank={rank!r} is neither a whole number from 1 nor a share of the numbers in (0, 1)")


def check_filled(name: str, path: str, shape: tuple[int, ...]) -> None:
    """Raise for an array without entries."""
    if not math.prod(shape):
        raise ValueError(f"{path}: {name} found shape {shape}, an array with no entries; keep it dense")
