"""Products whose backward pass shifts where it would multiply."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Contract = Callable[[jax.Array, jax.Array], jax.Array]


def shifted_backward(contract: Contract, exponents: tuple[int, int] | None = None) -> Contract:
    """A product whose gradient in the weights takes its inputs for powers of two (Lin et al. 2015, arXiv:1510.03009).

    The forward pass is ``contract(x, w)`` and the gradient in ``x`` is its own; in the gradient in ``w``, a sum of
    products of inputs and errors, each input is rounded to the nearest power of two, in the logarithm, so that hardware
    shifts the errors. With weights of -1, 0 and 1, by :class:`BinaryConnect` or ``jc.quantize.Ternary`` under
    ``jc.simulate``, few multiplications are left in training. On a device that multiplies anyway this says what such
    hardware would lose.

    Args:
      contract: linear in each of both: ``jnp.matmul``, a convolution.
      exponents: the least and the largest power that there is; inputs that are nearer to a smaller one count as 0.

    Returns:
      A function of the inputs and the weights, with this gradient.

    Raises:
      ValueError: for a least exponent above the largest.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jcompress.quantize.training import shifted_backward
      >>> product, x = shifted_backward(jnp.matmul), jnp.array([[3.0, -0.25]])
      >>> float(product(x, jnp.ones((2, 1)))[0, 0])
      2.75
      >>> jax.grad(lambda w: product(x, w).sum())(jnp.ones((2, 1))).ravel().tolist()
      [4.0, -0.25]
    """
    if exponents is not None and exponents[0] > exponents[1]:
        raise ValueError(f"shifted_backward: exponents={exponents}, expected the least and then the largest")

    @jax.custom_vjp
    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return contract(x, w)

    def forward(x: jax.Array, w: jax.Array) -> tuple[jax.Array, Any]:
        return contract(x, w), (_power(x, exponents), w)

    def backward(kept: Any, errors: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Of what is linear in each, the derivative in x does not see x.
        return jax.vjp(contract, *kept)[1](errors)

    product.defvjp(forward, backward)
    return product


def _power(x: jax.Array, exponents: tuple[int, int] | None) -> jax.Array:
    """The power of two that is nearest in the logarithm, with the sign; 0 for 0."""
    size = jnp.abs(x).astype(jnp.float32)
    exponent = jnp.round(jnp.log2(jnp.where(size > 0, size, 1)))
    seen = size > 0
    if exponents is not None:
        seen = seen & (exponent >= exponents[0])
        exponent = jnp.clip(exponent, *exponents)
    found = jnp.sign(x) * jnp.ldexp(jnp.float32(1), exponent.astype(jnp.int32)).astype(x.dtype)
    return jnp.where(seen, found, 0).astype(x.dtype)
