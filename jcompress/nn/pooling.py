"""Pooling that keeps what plain pooling loses: positions drawn at random, and details."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jcompress.nn.kernels import array, param


def s3pool(x: jax.Array, window: int = 2, grid: int | None = None, key: jax.Array | None = None) -> jax.Array:
    """Pooling that draws which rows and columns stay (S3Pool; Zhai et al. 2017, arXiv:1611.05138).

    The maximum over a window of each position comes first, without strides. Then of every ``grid`` rows one in
    ``window`` stays, drawn without replacement, in order, and of the columns alike: a distortion of the image that
    larger grids make stronger. Without a key each window has its mean, which for ``grid=window`` is the expectation.

    Args:
      x: features (..., height, width, channels). All of them get the same rows and columns.
      window: how much smaller height and width become.
      grid: rows among which some are drawn, a multiple of ``window``; ``window`` itself by default.
      key: in training.

    Returns:
      Features (..., height / window, width / window, channels).

    Raises:
      ValueError: if the grid does not divide height and width, or the window the grid.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> x = jnp.arange(16.0).reshape(1, 4, 4, 1)
      >>> jc.nn.s3pool(x)[0, :, :, 0].tolist()
      [[7.5, 9.0], [13.5, 15.0]]
      >>> jc.nn.s3pool(x, grid=4, key=jax.random.key(0)).shape
      (1, 2, 2, 1)
    """
    grid = window if grid is None else grid
    if window < 1 or grid % window or x.shape[-3] % grid or x.shape[-2] % grid:
        raise ValueError(
            f"s3pool: found x {x.shape}, window {window} and grid {grid}; expected a grid that divides height "
            "and width, and a window that divides the grid"
        )
    ones, ends = [1] * (x.ndim - 3), [(0, 0)] * (x.ndim - 3)
    least = jnp.array(-jnp.inf, x.dtype)
    size, padding = (*ones, window, window, 1), [*ends, (0, window - 1), (0, window - 1), (0, 0)]
    top = jax.lax.reduce_window(x, least, jax.lax.max, size, (1,) * x.ndim, padding)
    if key is None:
        return _means(top, window)
    for axis, part in zip((-3, -2), jax.random.split(key), strict=True):
        strips = x.shape[axis] // grid
        order = jnp.argsort(jax.random.uniform(part, (strips, grid), jnp.float32), axis=-1)
        stay = jnp.sort(order[:, : grid // window], axis=-1) + grid * jnp.arange(strips)[:, None]
        top = jnp.take(top, stay.ravel(), axis=axis)
    return top


def detail_preserving_pool(
    x: jax.Array,
    alpha: jax.Array | float = 1.0,
    power: jax.Array | float = 1.0,
    window: int = 2,
    symmetric: bool = False,
) -> jax.Array:
    """A mean in which what stands out counts more (DPP; Saeedan et al. 2018, arXiv:1804.04076, its lite form).

    ``sum w x / sum w`` over each window with ``w = alpha + r(x - m)``, ``m`` being the mean of the window and ``r(d) =
    max(d, 0)**power``, or ``|d|**power`` if symmetric, smoothed by 1e-3 so that its slope is finite. A large alpha or a
    power of 0 gives the mean, a large power nearly the maximum; both are learned, one of each a channel.

    Args:
      x: features (..., height, width, channels).
      alpha: above, positive: a number or (channels,).
      power: above, at least 0: a number or (channels,).
      window: how much smaller height and width become.
      symmetric: whether what is below the mean counts as what is above.

    Returns:
      Features (..., height / window, width / window, channels).

    Raises:
      ValueError: if the window does not divide height and width.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> x = jnp.array([[0.0, 0.0], [0.0, 4.0]])[None, :, :, None]
      >>> [round(float(jc.nn.detail_preserving_pool(x, 0.01, p)[0, 0, 0, 0]), 2) for p in (0.0, 1.0, 4.0)]
      [1.0, 3.96, 4.0]
    """
    if window < 1 or x.shape[-3] % window or x.shape[-2] % window:
        raise ValueError(
            f"detail_preserving_pool: found x {x.shape} and window {window}, expected one that divides height and width"
        )
    mean = jnp.repeat(jnp.repeat(_means(x, window), window, axis=-3), window, axis=-2)
    apart = x - mean if symmetric else jax.nn.relu(x - mean)
    stands_out = jnp.sqrt(jnp.square(apart) + 1e-6) ** jnp.asarray(power, x.dtype)
    weight = jnp.asarray(alpha, x.dtype) + stands_out
    return _means(weight * x, window) / _means(weight, window)


class DetailPreservingPool(nnx.Module):
    """:func:`detail_preserving_pool`, alpha and power learned for each channel (Saeedan et al. 2018, 1804.04076).

    Args:
      features: channels.
      window: how much smaller height and width become.
      symmetric: whether what is below the mean counts as what is above.
      param_dtype: of the parameters, the logarithms of both, which begin at 0.
      rngs: with a stream ``params``.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> from flax import nnx
      >>> jc.nn.DetailPreservingPool(3, rngs=nnx.Rngs(0))(jnp.ones((2, 8, 8, 3))).shape
      (2, 4, 4, 3)
    """

    def __init__(
        self,
        features: int,
        window: int = 2,
        *,
        symmetric: bool = False,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.alpha = param(rngs, nnx.initializers.zeros, (features,), param_dtype)
        self.power = param(rngs, nnx.initializers.zeros, (features,), param_dtype)
        self.window, self.symmetric = window, symmetric

    def __call__(self, x: jax.Array) -> jax.Array:
        """The features of fewer positions."""
        alpha, power = (jnp.exp(array(p).astype(x.dtype)) for p in (self.alpha, self.power))
        return detail_preserving_pool(x, alpha, power, self.window, self.symmetric)


def _means(x: jax.Array, window: int) -> jax.Array:
    """The mean of each window."""
    *front, h, w, c = x.shape
    return x.reshape(*front, h // window, window, w // window, window, c).mean((-4, -2))
