"""Distortions of weights, to see what a network bears (Merolla et al. 2016, arXiv:1606.01981).

Networks trained with some projection of their weights turn out robust to others: noise that is added, noise that
multiplies, and powers of magnitudes, of which signs are one end. To measure that, distort trained parameters leaf by
leaf; to train with a distortion, ``jc.straight_through(w, power(w, 0.5))``. The stochastic projection that the paper
proposes in the end, for training, is not here: its abstract does not say what it is.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

__all__ = ["additive", "multiplicative", "power"]


def additive(w: jax.Array, strength: float | jax.Array, key: jax.Array) -> jax.Array:
    """``w + strength * rms(w) * e`` with e standard normal, independent for each weight.

    Args:
      w: float array.
      strength: of the noise, in root mean squares of the array; a scalar, traced or not.
      key: for the noise, of this array's own.

    Returns:
      An array like ``w``.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> jc.quantize.distortions.additive(jnp.zeros(2), 0.5, jax.random.key(0)).tolist()
      [0.0, 0.0]
    """
    size = jnp.sqrt(jnp.mean(jnp.square(w.astype(jnp.float32)))) if w.size else jnp.float32(0)
    return (w + strength * size * jax.random.normal(key, w.shape, jnp.float32)).astype(w.dtype)


def multiplicative(w: jax.Array, strength: float | jax.Array, key: jax.Array) -> jax.Array:
    """``w * (1 + strength * e)`` with e standard normal, independent for each weight: zeros stay.

    Args:
      w: float array.
      strength: of the noise; a scalar, traced or not.
      key: for the noise, of this array's own.

    Returns:
      An array like ``w``.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> jc.quantize.distortions.multiplicative(jnp.array([2.0, 0.0]), 0.0, jax.random.key(0)).tolist()
      [2.0, 0.0]
    """
    return (w * (1 + strength * jax.random.normal(key, w.shape, jnp.float32))).astype(w.dtype)


def power(w: jax.Array, exponent: float | jax.Array) -> jax.Array:
    """``sign(w) * m * |w / m|**exponent`` for the largest magnitude m: 1 is the identity, 0 the sign, zeros stay.

    Args:
      w: float array.
      exponent: at least 0; a scalar, traced or not.

    Returns:
      An array like ``w``, of the same range.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.quantize.distortions.power(jnp.array([4.0, -1.0, 0.0]), 0.5).tolist()
      [4.0, -2.0, 0.0]
    """
    most = jnp.max(jnp.abs(w), initial=0)
    most = jnp.where(most > 0, most, 1)
    share = jnp.where(w != 0, jnp.abs(w) / most, 1)
    return jnp.where(w != 0, jnp.sign(w) * most * share**exponent, 0).astype(w.dtype)
