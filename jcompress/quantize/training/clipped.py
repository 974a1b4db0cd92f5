"""Activations clipped at a learned value, and signs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jcompress.numeric.surrogates import straight_through


def pact(x: jax.Array, alpha: jax.Array, bits: int) -> jax.Array:
    """``y = clip(x, 0, alpha)`` in steps of ``alpha / (2**bits - 1)`` (PACT; Choi et al. 2018, arXiv:1805.06085).

    ``y = (|x| - |x - alpha| + alpha) / 2`` before it is rounded. Rounding counts as the identity, so x gets its
    gradient where ``0 < x < alpha``, and alpha the sum of the gradients where ``x >= alpha``. An L2 penalty on alpha
    trades range for resolution.

    Args:
      x: float array.
      alpha: where to clip, a positive scalar or an array that broadcasts against x.
      bits: 1 to 8.

    Returns:
      The activations on the grid, of the shape and dtype of ``x``.

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress.quantize.training import pact
      >>> pact(jnp.array([-1.0, 0.6, 9.0]), jnp.array(3.0), bits=2).tolist()
      [0.0, 1.0, 3.0]
    """
    y = jnp.where(x >= alpha, alpha, jnp.where(x > 0, x, 0)).astype(x.dtype)
    step = jax.lax.stop_gradient(alpha) / (2**bits - 1)
    return straight_through(y, (jnp.round(y / step) * step).astype(x.dtype))


def sign_ste(x: jax.Array) -> jax.Array:
    """1 where ``x >= 0``, else -1; the gradient passes where ``|x| <= 1`` (Hubara et al. 2016, arXiv:1602.02830).

    The activation of binarized networks. Products of two such vectors of length n are ``n - 2 * popcount(a ^ b)``.

    Args:
      x: float array.

    Returns:
      1 and -1, of the shape and dtype of ``x``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jcompress.quantize.training import sign_ste
      >>> x = jnp.array([-2.0, -0.5, 0.0])
      >>> sign_ste(x).tolist(), jax.grad(lambda x: sign_ste(x).sum())(x).tolist()
      ([-1.0, -1.0, 1.0], [0.0, 1.0, 1.0])
    """
    inside = jnp.where(jnp.abs(x) <= 1, x, jax.lax.stop_gradient(x))
    return straight_through(inside, jnp.where(x >= 0, 1, -1).astype(x.dtype))


def scaled_sign(x: jax.Array, axis: int | tuple[int, ...] = -1) -> jax.Array:
    """``sign_ste(x) * mean |x|``, the nearest of all scaled signs (XNOR-Net; Rastegari et al. 2016, arXiv:1603.05279).

    Args:
      x: float array.
      axis: the axes that share a scale, those that the next layer contracts.

    Returns:
      An array like ``x``.

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress.quantize.training import scaled_sign
      >>> scaled_sign(jnp.array([[1.0, -3.0]])).tolist()
      [[2.0, -2.0]]
    """
    return sign_ste(x) * jnp.mean(jnp.abs(x), axis, keepdims=True)
