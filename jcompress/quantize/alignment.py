"""Weights for the inputs that a compressed network makes."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def align(w: jax.Array, gram: jax.Array, cross: jax.Array, rounds: int = 1) -> jax.Array:
    """Real weights that make of the compressed network's inputs what ``w`` makes of the dense network's.

    With inputs X of the dense network and Y of the compressed one, ``|X w - Y v|**2`` is lowered one coordinate after
    the other, ``rounds`` times over: the data alignment of order r of SPFQ (Zhang & Saab 2023, arXiv:2309.10975), after
    which :class:`GPFQ` with ``stochastic=True`` rounds v with the Gram matrix of Y. More rounds come nearer to least
    squares. Read off two statistics, a round is one triangular solve: ``tril(gram) v' = cross w - triu(gram, 1) v``,
    and the first, which has no v yet, ``tril(gram) v = tril(cross) w``.

    Args:
      w: (..., k, outputs), the kernel as a matrix over what it contracts.
      gram: (..., k, k), the sum of ``y y^T``, as from ``jc.calibrate`` of the compressed network.
      cross: (..., k, k), the sum of ``y x^T`` over the same data.
      rounds: r, at least 1.

    Returns:
      v, of the shape and dtype of ``w``; 0 for inputs that are always 0.

    Raises:
      ValueError: for fewer than one round.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
      >>> y = 2 * x
      >>> jc.quantize.align(jnp.array([[4.0], [2.0]]), y.T @ y, y.T @ x, rounds=20).round(3).tolist()
      [[2.0], [1.0]]
    """
    if rounds < 1:
        raise ValueError(f"align: rounds={rounds} must be positive")
    wide, high = w.astype(jnp.float32), jax.lax.Precision.HIGHEST
    seen = jnp.diagonal(gram, axis1=-2, axis2=-1) > 0
    lower = jnp.tril(gram) + jnp.eye(gram.shape[-1], dtype=gram.dtype) * ~seen[..., None]
    upper, goal = jnp.triu(gram, 1), jnp.matmul(cross, wide, precision=high)

    def solved(right: jax.Array) -> jax.Array:
        found = jax.scipy.linalg.solve_triangular(lower, right, lower=True)
        return jnp.where(seen[..., None], found, 0)

    def again(_: int, v: jax.Array) -> jax.Array:
        return solved(goal - jnp.matmul(upper, v, precision=high))

    first = solved(jnp.matmul(jnp.tril(cross), wide, precision=high))
    return jax.lax.fori_loop(1, rounds, again, first).astype(w.dtype)
