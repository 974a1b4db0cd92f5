"""Leading subspaces, and ranks from shares of the numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

_HIGH = jax.lax.Precision.HIGHEST
_ROUGH = 1e-2
_FEW = 64


def leading(matrix: jax.Array, rank: int) -> jax.Array:
    """Orthonormal columns (m, rank) that span the leading left singular vectors of a float32 (m, n).

    From the eigenvectors of the smaller Gram matrix, which squares what rounding makes of small singular values, and
    products with the matrix, which take that back: a subspace that holds the matrix is found to rounding.
    """
    m, n = matrix.shape
    if not matrix.size or rank >= m:
        return jnp.eye(m, rank, dtype=matrix.dtype)
    if m <= n:
        values, found = _eigenvectors(jnp.matmul(matrix, matrix.T, precision=_HIGH), rank)
        # The rounding of the Gram matrix counts where little beside it is left out.
        is_rough = values[rank:].sum() < _ROUGH * values.sum()
        return jax.lax.cond(is_rough, lambda u: moved(matrix, u), lambda u: u, found)
    _, right = _eigenvectors(jnp.matmul(matrix.T, matrix, precision=_HIGH), min(rank, n))
    found = jnp.matmul(matrix, right, precision=_HIGH)
    if rank > n:  # more columns than the matrix has directions: any others
        found = jnp.concatenate([found, jnp.eye(m, rank - n, dtype=matrix.dtype)], axis=1)
    return _orthonormal(found, jnp.eye(m, rank, dtype=matrix.dtype))


def sketched(matrix: jax.Array, rank: int, rounds: int = 2) -> jax.Array:
    """About :func:`leading`, singular vectors in their order, from a sketch that is always the same."""
    m, n = matrix.shape
    width = rank + 8
    if 4 * width > min(m, n):
        return leading(matrix, rank)
    start = jax.random.normal(jax.random.key(0), (n, width), matrix.dtype)
    u = jnp.linalg.qr(jnp.matmul(matrix, start, precision=_HIGH))[0]
    for _ in range(rounds):
        u = moved(matrix, u)
    back = jnp.matmul(u.T, matrix, precision=_HIGH)
    turned = _eigenvectors(jnp.matmul(back, back.T, precision=_HIGH), rank)[1]
    return jnp.matmul(u, turned, precision=_HIGH)


def moved(matrix: jax.Array, u: jax.Array) -> jax.Array:
    """A step of orthogonal iteration from orthonormal columns: none that hold less of the matrix's squared norm."""
    # Products of a thin matrix from the left: on a CPU three times as fast as the transposed ones.
    back = jnp.matmul(u.T, matrix, precision=_HIGH)
    return _orthonormal(jnp.matmul(matrix, back.T, precision=_HIGH), u)


def improved(matrix: jax.Array, u: jax.Array) -> jax.Array:
    """:func:`leading` from orthonormal columns near it; of many rows by a few steps, none of which loses anything."""
    if len(matrix) <= _FEW:
        return leading(matrix, u.shape[1])
    gram = jnp.matmul(matrix, matrix.T, precision=_HIGH)
    for _ in range(3):
        u = _orthonormal(jnp.matmul(gram, u, precision=_HIGH), u)
    return moved(matrix, u)


def _orthonormal(columns: jax.Array, start: jax.Array) -> jax.Array:
    """Of what the matrix does not reach columns stay as they were, so that they are independent."""
    size = jnp.linalg.norm(columns, axis=0)
    dead = size <= size.max() * 1e-6
    return jnp.linalg.qr(jnp.where(dead, start, columns / jnp.where(dead, 1, size)))[0]


def _eigenvectors(gram: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """All eigenvalues, falling, and the leading eigenvectors."""
    values, vectors = jnp.linalg.eigh(gram)
    return values[::-1], vectors[:, ::-1][:, :rank]


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
