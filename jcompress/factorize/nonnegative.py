"""Factors without negative numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Context, Method
from jcompress.factorize.subspaces import check_rank
from jcompress.factorize.svd import chosen_rank
from jcompress.formats import LowRank
from jcompress.formats.network import solve
from jcompress.numeric import scaling

_HIGH = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class NMF(Method):
    """``W ~ F G`` with ``G >= 0``, and with ``F >= 0`` where ``W`` is, by multiplicative updates.

    Of a matrix without negative numbers each update is ``G <- G * (F^T W) / (F^T F G)`` and its like for ``F`` (Lee &
    Seung 2001). Of a signed one only ``G`` is kept from below zero and ``F`` is fitted in least squares: semi-NMF (Ding
    et al. 2010), whose parts may be read as cluster centres. No update makes the error larger.

    Attributes:
      rank: the rank, or the share of the numbers that is kept, in (0, 1).
      semi: whether ``F`` may have any sign. A plain one of a signed matrix is an error outside ``jit``.
      sweeps: updates of either factor.

    Raises:
      ValueError: for a rank above the limit, or negative numbers without ``semi``.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> w = jnp.outer(jnp.arange(1.0, 5.0), jnp.arange(1.0, 4.0))
      >>> node = jc.factorize.NMF(rank=1, semi=False)(w)
      >>> bool((node.u >= 0).all()), bool(jnp.allclose(node.materialize(), w, rtol=1e-3))
      (True, True)
    """

    rank: int | float
    semi: bool = True
    sweeps: int = 200

    def __post_init__(self) -> None:
        check_rank("NMF", self.rank)

    def check(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise if the array is no matrix or the rank exceeds its smaller side."""
        chosen_rank("NMF", path, self.rank, shape)

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> LowRank:
        """The node for one array."""
        least = jnp.min(w, initial=0)
        if not self.semi and core.is_concrete(least) and float(least) < 0:
            raise ValueError(f"{context.path}: NMF(semi=False) found weights down to {float(least):.3g}; use semi=True")
        return _fitted(self, w, chosen_rank("NMF", context.path, self.rank, w.shape))


def _fitted(method: NMF, w: jax.Array, rank: int) -> LowRank:
    unit = scaling.unit([w])
    matrix = unit.divide(w).reshape(-1, w.shape[-1])
    rows, columns = jax.random.split(jax.random.key(0))
    size = jnp.sqrt(jnp.mean(jnp.abs(matrix)) / max(rank, 1)) if matrix.size else 0.0
    f = size * jax.random.uniform(rows, (len(matrix), rank), jnp.float32, minval=0.1)
    g = size * jax.random.uniform(columns, (rank, matrix.shape[1]), jnp.float32, minval=0.1)

    def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.matmul(a, b, precision=_HIGH)

    def ratio(above: jax.Array, below: jax.Array) -> jax.Array:
        return above / jnp.maximum(below, jnp.finfo(jnp.float32).tiny)

    def plain(_: int, pair: tuple) -> tuple:
        f, g = pair
        f = f * ratio(jnp.maximum(matmul(matrix, g.T), 0), matmul(f, matmul(g, g.T)))
        return f, g * ratio(jnp.maximum(matmul(f.T, matrix), 0), matmul(matmul(f.T, f), g))

    def signed(_: int, pair: tuple) -> tuple:
        _, g = pair
        f = solve(matmul(g, g.T), matmul(g, matrix.T)).T
        cross, square = matmul(f.T, matrix), matmul(f.T, f)
        up = jnp.maximum(cross, 0) + matmul(jnp.maximum(-square, 0), g)
        down = jnp.maximum(-cross, 0) + matmul(jnp.maximum(square, 0), g)
        return f, g * jnp.sqrt(ratio(up, down))

    f, g = jax.lax.fori_loop(0, method.sweeps, signed if method.semi else plain, (f, g))
    if method.semi:
        f = solve(matmul(g, g.T), matmul(g, matrix.T)).T
    f, g = unit.root * f, unit.root * g
    return LowRank(f.reshape(*w.shape[:-1], rank).astype(w.dtype), g.astype(w.dtype))
