"""How alike two representations are."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def linear_cka(x: jax.Array, y: jax.Array) -> jax.Array:
    """Linear centered kernel alignment of two representations of the same examples (Kornblith et al. 2019, 1905.00414).

    ``||Y' X||_F**2 / (||X' X||_F ||Y' Y||_F)`` of features centered over the examples. 1 if one is the other after an
    orthogonal map and a scale, 0 if no feature of one correlates with any of the other. 0 by definition if one is
    constant.

    Args:
      x: (n, ...), one row an example; further axes are flattened.
      y: (n, ...), of any width.

    Returns:
      A float32 scalar in [0, 1].

    Raises:
      ValueError: if the numbers of examples differ.

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress import measure
      >>> x = jnp.array([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
      >>> round(float(measure.linear_cka(x, 3 * x[:, ::-1])), 4)
      1.0
    """
    if x.shape[0] != y.shape[0]:
        raise ValueError(f"linear_cka: found {x.shape[0]} and {y.shape[0]} examples; give both for the same ones")
    x, y = _centered(x), _centered(y)
    cross = jnp.sum(jnp.square(jnp.matmul(y.T, x, precision="highest")))
    scale = jnp.sqrt(_gram_norm_squared(x)) * jnp.sqrt(_gram_norm_squared(y))
    return jnp.where(scale > 0, cross / jnp.where(scale > 0, scale, 1), 0)


def _centered(x: jax.Array) -> jax.Array:
    rows = x.reshape(x.shape[0], -1).astype(jnp.float32)
    rows = rows - jnp.mean(rows, axis=0)
    # Large features would overflow in the fourth power; the measure does not depend on scale.
    largest = jnp.max(jnp.abs(rows), initial=0)
    return rows / jnp.where(largest > 0, largest, 1)


def _gram_norm_squared(x: jax.Array) -> jax.Array:
    small = (
        jnp.matmul(x.T, x, precision="highest") if x.shape[1] <= x.shape[0] else jnp.matmul(x, x.T, precision="highest")
    )
    return jnp.sum(jnp.square(small))


def gaussian_wasserstein(x: jax.Array, y: jax.Array) -> jax.Array:
    """The squared 2-Wasserstein distance of the Gaussians fitted to two sets of rows.

    ``||m_x - m_y||**2 + tr(C_x + C_y - 2 (C_x^1/2 C_y C_x^1/2)^1/2)`` with means and covariances over the rows (Dowson
    & Landau 1982). The trace of the last root is the sum of singular values of ``C_x^1/2 C_y^1/2``. 0 for equal sets.

    Args:
      x: (n, d), one row a sample: of activations, or the neurons of a kernel.
      y: (m, d).

    Returns:
      A float32 scalar, not negative.

    Raises:
      ValueError: if the widths differ.

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress import measure
      >>> x = jnp.array([[0.0], [2.0]])
      >>> round(float(measure.gaussian_wasserstein(x, x + 3.0)), 4)
      9.0
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"gaussian_wasserstein: found shapes {x.shape} and {y.shape}, expected (n, d) and (m, d)")
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    mean_x, mean_y = jnp.mean(x, axis=0), jnp.mean(y, axis=0)
    # With X' X / n = C, the singular values of X Y' / sqrt(n m) are those of C_x^1/2 C_y^1/2.
    x, y = (x - mean_x) / x.shape[0] ** 0.5, (y - mean_y) / y.shape[0] ** 0.5
    overlap = jnp.sum(jnp.linalg.svd(jnp.matmul(_short(x), _short(y).T, precision="highest"), compute_uv=False))
    spread = jnp.sum(jnp.square(x)) + jnp.sum(jnp.square(y)) - 2 * overlap
    return jnp.sum(jnp.square(mean_x - mean_y)) + jnp.maximum(spread, 0)


def _short(x: jax.Array) -> jax.Array:
    """A matrix of at most d rows with the same ``X' X``."""
    return jnp.linalg.qr(x, mode="r") if x.shape[0] > x.shape[1] else x
