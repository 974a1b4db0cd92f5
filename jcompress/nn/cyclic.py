"""Cyclic symmetry: four turned copies of a batch, and what joins them (Dieleman et al. 2016)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jcompress.nn.kernels import Padding, array, biased, convolved, lecun_normal, param, share, sizes, zeros


def cyclic_slice(x: jax.Array) -> jax.Array:
    """Four copies of each image, turned by 0 to 3 right angles (Dieleman et al. 2016, arXiv:1602.02660).

    Args:
      x: square images (batch, n, n, channels).

    Returns:
      (4 batch, n, n, channels): the images as they are, then all of them turned once, twice, three times.

    Raises:
      ValueError: for images that are not square.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.nn.cyclic_slice(jnp.ones((2, 8, 8, 3))).shape
      (8, 8, 8, 3)
    """
    _square("cyclic_slice", x)
    return jnp.concatenate([jnp.rot90(x, r, (1, 2)) for r in range(4)])


def cyclic_roll(x: jax.Array) -> jax.Array:
    """Each copy with the features of all four, turned onto its own (Dieleman et al. 2016, arXiv:1602.02660).

    ``y_r = [x_r, T^-1 x_{r+1}, T^-2 x_{r+2}, T^-3 x_{r+3}]``: as many filters give four times the features.

    Args:
      x: (4 batch, n, n, channels), as :func:`cyclic_slice` gives; or (4 batch, channels).

    Returns:
      (4 batch, n, n, 4 channels), or (4 batch, 4 channels).

    Raises:
      ValueError: for a batch that four does not divide, or images that are not square.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.nn.cyclic_roll(jnp.arange(4.0)[:, None])[1].tolist()
      [1.0, 2.0, 3.0, 0.0]
    """
    copies = _copies("cyclic_roll", x)
    rolled = [[_back(copies[(r + j) % 4], j) for j in range(4)] for r in range(4)]
    return jnp.concatenate([jnp.concatenate(row, axis=-1) for row in rolled])


def cyclic_stack(x: jax.Array) -> jax.Array:
    """The features of all four copies, turned back, one behind the other (Dieleman et al. 2016, arXiv:1602.02660).

    Args:
      x: (4 batch, n, n, channels), as :func:`cyclic_slice` gives; or (4 batch, channels).

    Returns:
      (batch, n, n, 4 channels), or (batch, 4 channels).

    Raises:
      ValueError: for a batch that four does not divide, or images that are not square.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.nn.cyclic_stack(jnp.arange(4.0)[:, None]).tolist()
      [[0.0, 1.0, 2.0, 3.0]]
    """
    copies = _copies("cyclic_stack", x)
    return jnp.concatenate([_back(copy, r) for r, copy in enumerate(copies)], axis=-1)


def cyclic_pool(x: jax.Array, reduce: Callable[..., jax.Array] = jnp.mean) -> jax.Array:
    """One of four copies: the mean, or another reduction (Dieleman et al. 2016, arXiv:1602.02660).

    Features (4 batch, channels) become invariant to turns of the images; those of positions are turned back first, and
    turn with the images.

    Args:
      x: (4 batch, n, n, channels), or (4 batch, channels).
      reduce: ``reduce(copies, axis=0)`` of (4, batch, ...), such as ``jnp.max``.

    Returns:
      (batch, n, n, channels), or (batch, channels).

    Raises:
      ValueError: for a batch that four does not divide, or images that are not square.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.nn.cyclic_pool(jnp.arange(4.0)[:, None]).tolist()
      [[1.5]]
    """
    copies = _copies("cyclic_pool", x)
    return reduce(jnp.stack([_back(copy, r) for r, copy in enumerate(copies)]), axis=0)


def _back(x: jax.Array, turns: int) -> jax.Array:
    return jnp.rot90(x, -turns, (1, 2)) if x.ndim == 4 else x


def _copies(name: str, x: jax.Array) -> list[jax.Array]:
    size = share(name, "a batch of", x.shape[0], 4)
    if x.ndim != 2:
        _square(name, x)
    return [x[r * size : (r + 1) * size] for r in range(4)]


def _square(name: str, x: jax.Array) -> None:
    if x.ndim != 4 or x.shape[1] != x.shape[2]:
        raise ValueError(f"{name}: found shape {x.shape}, expected square images (batch, n, n, channels)")


class CyclicConv(nnx.Module):
    """A convolution of four turned copies, then :func:`cyclic_roll` (Dieleman et al. 2016, arXiv:1602.02660).

    A quarter of the filters gives ``out_features`` features: ``k k in out / 4`` numbers, and as many multiply-adds a
    position of each copy. It stands between :func:`cyclic_slice` of the images and :func:`cyclic_pool` of the outputs.

    Args:
      in_features: channels that come.
      out_features: channels after the roll.
      kernel_size: of the window.
      padding: as ``jax.lax`` takes it.
      use_bias: whether the filters have one.
      kernel_init: of the kernel (k, k, in_features, out_features / 4).
      param_dtype: of the parameters.
      rngs: with a stream ``params``.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> from flax import nnx
      >>> layer = jc.nn.CyclicConv(3, 8, (3, 3), rngs=nnx.Rngs(0))
      >>> layer(jc.nn.cyclic_slice(jnp.ones((2, 8, 8, 3)))).shape
      (8, 8, 8, 8)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int] = 3,
        *,
        padding: Padding = "SAME",
        use_bias: bool = True,
        kernel_init: Callable[..., Any] = lecun_normal,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        filters = share("CyclicConv", "out_features", out_features, 4)
        self.kernel = param(rngs, kernel_init, (*sizes(kernel_size), in_features, filters), param_dtype)
        self.bias = zeros(use_bias, filters, param_dtype)
        self.padding = padding

    def __call__(self, x: jax.Array) -> jax.Array:
        """Features of four copies from features of four copies."""
        y = convolved("CyclicConv", x, array(self.kernel), 1, self.padding)
        return cyclic_roll(biased(y, array(self.bias)))
