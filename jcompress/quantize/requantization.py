"""From sums of integer products to codes of the next layer, with integers alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jcompress import core


def fixed_point(multiplier: Any) -> tuple[jax.Array, jax.Array]:
    """``m0`` and ``n`` with ``multiplier = m0 * 2**-31 * 2**-n`` and ``m0 * 2**-31`` in [1/2, 1).

    The multiplier of a layer is ``s_x * s_w / s_y``: the scales of its inputs and weights over that of its outputs. It
    is known before anything runs, so that :func:`requantize` needs integers only (Jacob et al. 2018, arXiv:1712.05877,
    section 2.2). Exact for float32.

    Args:
      multiplier: in (0, 1), float, a scalar or one for each output.

    Returns:
      ``(m0, n)``, int32 in the shape of the multiplier.

    Raises:
      ValueError: for a multiplier outside (0, 1): then the outputs have a finer grid than the sums.

    Example:
      >>> import jcompress as jc
      >>> m0, n = jc.quantize.fixed_point(0.375)
      >>> int(m0), int(n), int(m0) * 2.0**-31 * 2.0 ** -int(n)
      (1610612736, 1, 0.375)
    """
    multiplier = jnp.asarray(multiplier, jnp.float32)
    if core.is_concrete(multiplier) and not bool(jnp.all((multiplier > 0) & (multiplier < 1))):
        raise ValueError(f"fixed_point: multiplier={multiplier} is outside (0, 1); give the outputs a coarser scale")
    fraction, exponent = jnp.frexp(multiplier)
    return (fraction * 2.0**31).astype(jnp.int32), -exponent.astype(jnp.int32)


def requantize(
    sums: jax.Array, m0: jax.Array, n: jax.Array, zero: Any = 0, *, bits: int = 8, signed: bool = True
) -> jax.Array:
    """Codes ``clip(round(sums * m0 * 2**-31 * 2**-n) + zero)``, by a product of 64 bits and a shift, in int32.

    With int8 inputs and weights, biases as int32 of scale ``s_x * s_w``, and this between layers, a network runs on
    integers alone (Jacob et al. 2018, arXiv:1712.05877). Rounding is to nearest, halves up. A ReLU is the clip: with
    ``zero`` at the lowest code nothing below 0 is left.

    Args:
      sums: int32, of products of codes with zero points taken off, biases added.
      m0: int32, from :func:`fixed_point`; broadcasts against the sums.
      n: int32, likewise.
      zero: the zero point of the outputs, an integer.
      bits: 2 to 8.
      signed: whether codes run from ``-2**(bits - 1)``, as int8, or from 0, as uint8.

    Returns:
      int8 or uint8, of the shape of the sums.

    Raises:
      TypeError: for sums that are not int32.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> m0, n = jc.quantize.fixed_point(0.01)
      >>> jc.quantize.requantize(jnp.array([160, 1000, -1251, 90000]), m0, n, zero=3).tolist()
      [5, 13, -10, 127]
    """
    if sums.dtype != jnp.int32:
        raise TypeError(
            f"requantize: found sums of {sums.dtype}, expected int32, preferred_element_type of the product"
        )
    high, low = _product(sums, jnp.asarray(m0, jnp.int32))
    given = jnp.asarray(n, jnp.int32)
    n = jnp.clip(given, 0, 31)
    whole = jnp.where(n == 0, (high << 1) | (low >> 31).astype(jnp.int32), high >> jnp.maximum(n - 1, 0))
    half = jnp.where(n == 1, low >> 31, low >> 30).astype(jnp.int32)
    half = jnp.where(n >= 2, high >> jnp.maximum(n - 2, 0), half) & 1
    least = -(2 ** (bits - 1)) if signed else 0
    nearest = jnp.where(given > 31, 0, whole + half)  # below a half, whatever the sum
    codes = jnp.clip(_added(nearest, zero), least, least + 2**bits - 1)
    return codes.astype(jnp.int8 if signed else jnp.uint8)


def _product(x: jax.Array, m: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The upper and lower 32 bits of a product of int32, the second factor positive: by halves of 16 bits."""
    x_high, x_low = x >> 16, (x & 0xFFFF).astype(jnp.uint32)
    m_high, m_low = m >> 16, (m & 0xFFFF).astype(jnp.uint32)
    lowest, cross = x_low * m_low, x_low * m_high.astype(jnp.uint32)
    other = x_high * m_low.astype(jnp.int32)
    middle = (other & 0xFFFF).astype(jnp.uint32) + (cross & 0xFFFF) + (lowest >> 16)
    high = x_high * m_high + (other >> 16) + (cross >> 16).astype(jnp.int32) + (middle >> 16).astype(jnp.int32)
    return high, (middle << 16) | (lowest & 0xFFFF)


def _added(whole: jax.Array, zero: Any) -> jax.Array:
    """The sum with a zero point, whose codes end long before int32 does."""
    return jnp.clip(whole, -(2**30), 2**30) + jnp.asarray(zero, jnp.int32)
