"""Toeplitz-like matrices: those of low displacement rank."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core
from jcompress.core import Context, Method
from jcompress.formats import FastProduct, Gathered
from jcompress.numeric import scaling
from jcompress.share.circulant import check_matrix

_STEPS = ("circulant", "skew")


@dataclasses.dataclass(frozen=True)
class Toeplitz(Method):
    """A matrix of low displacement rank (Kailath et al. 1979; Sindhwani et al. 2015, arXiv:1510.01722).

    ``w = sum_t Z_1(g_t) Z_-1(h_t)`` over ``rank`` products of a circulant and a skew-circulant matrix. Then
    ``Z w - w S`` with the shifts ``Z = Z_1(e_1)`` and ``S = Z_-1(e_1)`` has this rank, and the converse. Rank 1 holds
    circulant matrices, rank 2 Toeplitz ones, their inverses, and products of two circulants.

    It starts from the best approximation of the displacement, or from the nearest Toeplitz matrix (the means of the
    diagonals; of rank 1 the nearest circulant) and the displacement of what it leaves, whichever is nearer, and goes on
    by alternating least squares. So a square matrix of this displacement rank is recovered, and none is farther than
    the nearest Toeplitz matrix. A matrix that is not square is cut from one that is; the window and inputs of a
    convolution count as one axis.

    Diagonals cross all devices that hold a part of an array, so a sharded one is gathered.

    Attributes:
      rank: of the displacement; ``2 * rank * max(inputs, outputs)`` numbers are kept.
      sweeps: of alternating least squares.

    Raises:
      ValueError: for a rank below 1 or above the length of a side, or an array that is no matrix.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> w = jnp.array([[1.0, 2.0, 3.0], [4.0, 1.0, 2.0], [5.0, 4.0, 1.0]])
      >>> node = jc.share.Toeplitz(rank=2)(w)
      >>> bool(jnp.allclose(node.materialize(), w, atol=1e-4)), node.nbits()
      (True, 384)
    """

    rank: int = 2
    sweeps: int = 2

    def __post_init__(self) -> None:
        if not isinstance(self.rank, (int, np.integer)) or self.rank < 1:
            raise ValueError(f"Toeplitz: rank={self.rank!r} must be a positive integer")
        check_sweeps("Toeplitz", self.sweeps)

    def check(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise if the rank is above that of any displacement."""
        n = length_of("Toeplitz", path, shape)
        if self.rank > n:
            raise ValueError(f"{path}: Toeplitz found rank={self.rank}, expected at most {n}, where it is exact")

    @core.compiled
    def __call__(self, w: jax.Array, context: Context = Context(), /) -> FastProduct:
        """The node for one array."""
        self.check(context.path, w.shape, w.dtype)
        unit = scaling.unit([w])
        x = unit.divide(w if context.where is None else jnp.where(context.where, w, 0))
        start = self._start(x.reshape(-1, x.shape[-1]), max(w.size // w.shape[-1], w.shape[-1]))
        return fitted(w, context, (unit.saturated(start[0]), start[1]), _STEPS, self.sweeps)

    def _start(self, w: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
        if self.rank == 1:
            nearest = Gathered(None, w.shape, "circulant", (n,)).project(w).materialize()
        else:
            nearest = _diagonal_means(w)
        u, v = jax.vmap(lambda w: _displaced(w, n, self.rank))(jnp.stack([w, nearest, w - nearest]))
        few = min(self.rank, 2)
        either = tuple(
            jnp.stack([x[0], jnp.concatenate([x[1, :, :few], x[2, :, : self.rank - few]], -1)]) for x in (u, v)
        )
        found = FastProduct(either, _STEPS, w.shape).materialize()
        best = jnp.argmin(jnp.sum(jnp.square(found - w), (-2, -1)))
        return either[0][best], either[1][best]


def _displaced(w: jax.Array, n: int, rank: int) -> tuple[jax.Array, jax.Array]:
    """Vectors (n, rank) of the matrix whose displacement is nearest to that of ``w``, continued along its diagonals."""
    rows, columns = (jnp.arange(n)[:, None], jnp.arange(n)[None])
    m, k = w.shape
    if m < n:
        w = w[jnp.minimum(rows, m - 1), (columns - jnp.maximum(rows - (m - 1), 0)) % n]
    elif k < n:
        w = w[(rows - jnp.maximum(columns - (k - 1), 0)) % n, jnp.minimum(columns, k - 1)]
    after = jnp.concatenate([-w[:, -1:], w[:, :-1]], axis=1)
    u, v = _leading((jnp.roll(w, -1, axis=0) - after) / 2, rank)
    return u[::-1], v


def _leading(matrix: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """``u @ v.T`` of this rank near a square matrix, by a sketch that is always the same: exact if it has the rank."""
    n, width = len(matrix), min(rank + 8, len(matrix))
    high = jax.lax.Precision.HIGHEST

    def turn(_: int, q: jax.Array) -> jax.Array:
        left = jnp.linalg.qr(jnp.matmul(matrix, q, precision=high))[0]
        return jnp.linalg.qr(jnp.matmul(matrix.T, left, precision=high))[0]

    q = jax.lax.fori_loop(0, 3, turn, jax.random.normal(jax.random.key(0), (n, width), matrix.dtype))
    u, s, vt = jnp.linalg.svd(jnp.matmul(matrix, q, precision=high), full_matrices=False)
    root = jnp.sqrt(s[:rank])
    return u[:, :rank] * root, jnp.matmul(q, vt[:rank].T, precision=high) * root


def _diagonal_means(w: jax.Array) -> jax.Array:
    """The nearest Toeplitz matrix."""
    m, k = w.shape
    place = jnp.arange(k)[None] - jnp.arange(m)[:, None] + (m - 1)
    total = jnp.zeros(m + k - 1, w.dtype).at[place].add(w)
    return (total / jnp.zeros(m + k - 1, w.dtype).at[place].add(1))[place]


def fitted(
    w: jax.Array, context: Context, vectors: tuple[jax.Array, ...], steps: tuple[str, ...], sweeps: int, seed: int = 0
) -> FastProduct:
    """The node after sweeps from these vectors, of the dtype of the array."""
    node = FastProduct(vectors, steps, w.shape, seed)
    where = None if context.where is None else jnp.broadcast_to(context.where, w.shape)
    found = node.refitted(vectors, w, where, sweeps)
    return dataclasses.replace(node, vectors=tuple(v.astype(w.dtype) for v in found))


def length_of(name: str, path: str, shape: tuple[int, ...]) -> int:
    """The longer side of a matrix over all that is contracted."""
    check_matrix(name, path, shape)
    if not all(shape):
        raise ValueError(f"{path}: {name} found shape {shape}, which has no entries; leave it dense")
    size = 1
    for n in shape[:-1]:
        size *= n
    return max(size, shape[-1])


def check_sweeps(name: str, sweeps: int) -> None:
    """Raise for a number of sweeps that is none."""
    if not isinstance(sweeps, (int, np.integer)) or sweeps < 0:
        raise ValueError(f"{name}: sweeps={sweeps!r} must be an integer from 0 on")
