"""DoReFa-Net: low-bit weights, activations and gradients (Zhou et al. 2016, arXiv:1606.06160)."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jcompress.core import Context, Method
from jcompress.formats import FakeQuantized
from jcompress.formats.fake_quantized import squashed
from jcompress.numeric.surrogates import clip_outside, round_through, straight_through
from jcompress.quantize import grids
from jcompress.quantize.training.steps import spanning

__all__ = ["activation", "gradient", "weight"]


@dataclasses.dataclass(frozen=True)
class DoReFa(Method):
    """Weights through tanh on a grid from -1 to 1, times a learned scale (Zhou et al. 2016, arXiv:1606.06160).

    ``s * (2 * Q(tanh(w) / (2 * max |tanh(w)|) + 1/2) - 1)`` with ``Q(r) = round((2**bits - 1) * r) / (2**bits - 1)``.
    The grid has no zero. The paper has ``s = 1`` and leaves the scale to batch norm; here it starts at the largest
    magnitude, so that a trained network keeps its function, and is trained. :func:`dorefa.weight` is the paper's.

    Attributes:
      bits: bits a code, 2 to 8.

    Raises:
      ValueError: for bits outside 2 to 8.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.quantize.training.DoReFa(bits=2)(jnp.array([3.0, 0.5])).materialize().tolist()
      [3.0, 1.0]
    """

    bits: int = 4
    group_size = axis = None

    def __post_init__(self) -> None:
        grids.validate_bits(self, least=2)

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> FakeQuantized:
        """The node for one array."""
        return spanning(self, w, context, "tanh")


def weight(w: jax.Array, bits: int) -> jax.Array:
    """``2 * Q(tanh(w) / (2 * max |tanh(w)|) + 1/2) - 1`` over the whole array; Q has derivative one.

    One bit is ``sign(w) * mean |w|``, with the identity for derivative, as the paper has it (equation 7).

    Args:
      w: float array.
      bits: 1 to 8.

    Returns:
      Values in [-1, 1], of one bit ``mean |w|`` and its negative; of the shape of ``w``.

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress.quantize.training import dorefa
      >>> dorefa.weight(jnp.array([0.0, 2.0, -0.1]), bits=2).tolist()
      [0.3333333730697632, 1.0, -0.3333333134651184]
    """
    if bits == 1:
        return straight_through(w, (jnp.where(w >= 0, 1, -1) * jnp.mean(jnp.abs(w))).astype(w.dtype))
    return 2 * _steps(squashed(w, tuple(range(-w.ndim, 0))) / 2 + 0.5, bits) - 1


def activation(x: jax.Array, bits: int) -> jax.Array:
    """``Q(clip(x, 0, 1))``; the gradient passes where ``0 < x < 1``.

    Args:
      x: float array.
      bits: 1 to 8.

    Returns:
      Values in [0, 1], of the shape and dtype of ``x``.

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress.quantize.training import dorefa
      >>> dorefa.activation(jnp.array([-0.3, 0.6, 1.2]), bits=1).tolist()
      [0.0, 1.0, 1.0]
    """
    return _steps(clip_outside(x, 0, 1), bits)


def _steps(r: jax.Array, bits: int) -> jax.Array:
    n = 2**bits - 1
    return round_through(n * r) / n


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def gradient(x: jax.Array, bits: int, key: jax.Array) -> jax.Array:
    """``x`` forward; backward its gradient in a few bits, rounded at random, without bias.

    ``2 m * (Q(g / (2 m) + 1/2 + u / (2**bits - 1)) - 1/2)`` for u uniform in (-1/2, 1/2) and m the largest magnitude in
    one example; the first axis counts examples.

    Args:
      x: float array (examples, ...).
      bits: 1 to 8.
      key: for the noise, of this place in the network and this step.

    Returns:
      ``x``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jcompress.quantize.training import dorefa
      >>> def loss(x):
      ...     return (dorefa.gradient(x, 2, jax.random.key(0)) * jnp.array([[3.0, -3.0]])).sum()
      >>> jax.grad(loss)(jnp.ones((1, 2))).tolist()
      [[3.0, -3.0]]
    """
    return x


def _forward(x: jax.Array, bits: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x, key


def _backward(bits: int, key: jax.Array, g: jax.Array) -> tuple[Any, None]:
    return rounded_at_random(g, bits, key, tuple(range(1, g.ndim))), None


gradient.defvjp(_forward, _backward)


def rounded_at_random(g: jax.Array, bits: int, key: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """DoReFa's gradient quantizer: ``2**bits`` levels from ``-max |g|`` to ``max |g|`` over some axes, unbiased."""
    n = 2**bits - 1
    x = g.astype(jnp.float32)
    most = jnp.max(jnp.abs(x), axes, keepdims=True, initial=0.0)
    place = n * (x / (2 * jnp.where(most > 0, most, 1.0)) + 0.5)
    noise = jax.random.uniform(key, g.shape, jnp.float32, -0.5, 0.5)
    return (most * (2 * jnp.clip(jnp.round(place + noise), 0, n) / n - 1)).astype(g.dtype)
