"""Activations clipped at a learned value, and signs."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jcompress.numeric.surrogates import clip_outside, round_through, straight_through


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


def xnor(w: jax.Array, axes: tuple[int, ...] | None = None) -> jax.Array:
    """Weights of one bit, ``sign(w) * a`` with ``a = mean |w|`` (XNOR-Net; Rastegari et al. 2016, arXiv:1603.05279).

    Backward, for a gradient g of the dense array, ``g * (1 / n + a * 1[|w| <= 1])``, n the weights that share a scale.

    Args:
      w: float array.
      axes: the axes that share a scale; by default all but the last, so that each output has one.

    Returns:
      An array like ``w``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jcompress.quantize.training import xnor
      >>> w = jnp.array([[0.5], [-1.5]])
      >>> xnor(w).tolist(), jax.grad(lambda w: xnor(w).sum())(w).tolist()
      ([[1.0], [-1.0]], [[1.5], [0.5]])
    """
    axes = tuple(range(-w.ndim, -1)) or (-1,) if axes is None else axes
    scale = jax.lax.stop_gradient(jnp.mean(jnp.abs(w), axes, keepdims=True))
    number = max(w.size / max(scale.size, 1), 1)
    slope = 1 / number + scale * (jnp.abs(jax.lax.stop_gradient(w)) <= 1)
    return straight_through(w * slope.astype(w.dtype), (jnp.where(w >= 0, 1, -1) * scale).astype(w.dtype))


def xnor_input_scales(
    x: jax.Array, window: tuple[int, ...], strides: tuple[int, ...] | None = None, padding: str = "SAME"
) -> jax.Array:
    """Scales of binary convolutions: ``K``, the mean over each window of the mean over channels of ``|x|``.

    ``x conv w ~ (sign(x) conv sign(w)) * K * a``, with a scale a for each output (XNOR-Net; Rastegari et al. 2016,
    arXiv:1603.05279, section 3.2). Padding counts as zeros, and in the mean.

    Args:
      x: (examples, ..., channels), what the convolution reads.
      window: the kernel's spatial shape.
      strides: of the convolution; ones by default.
      padding: ``"SAME"`` or ``"VALID"``.

    Returns:
      (examples, ..., 1), of the spatial shape that the convolution gives.

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress.quantize.training import xnor_input_scales
      >>> xnor_input_scales(jnp.array([[[1.0, -3.0], [4.0, 0.0], [0.0, 0.0]]]), (2,), padding="VALID").tolist()
      [[[2.0], [1.0]]]
    """
    strides = (1,) * len(window) if strides is None else strides
    mean = jnp.mean(jnp.abs(x), -1, keepdims=True)
    total = jax.lax.reduce_window(
        mean, jnp.zeros((), mean.dtype), jax.lax.add, (1, *window, 1), (1, *strides, 1), padding
    )
    return total / math.prod(window)


def wrpn(w: jax.Array, bits: int) -> jax.Array:
    """Weights clipped to [-1, 1] in steps of ``1 / (2**(bits - 1) - 1)`` (WRPN; Mishra et al. 2018, arXiv:1709.01134).

    The gradient passes strictly within the range. Activations are those of :func:`dorefa.activation`. What the paper
    adds is width: layers with two or three times the channels win back what few bits lose. Stored, these weights are
    ``jc.quantize.Int(bits, axis=None, clip=jc.quantize.ranges.Fixed(None, 1.0))``.

    Args:
      w: float array.
      bits: 2 to 8, the sign among them.

    Returns:
      Values in [-1, 1], of the shape and dtype of ``w``.

    Raises:
      ValueError: for fewer than two bits, of which one is the sign.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jcompress.quantize.training import wrpn
      >>> w = jnp.array([-1.5, 0.3, 0.8])
      >>> wrpn(w, bits=2).tolist(), jax.grad(lambda w: wrpn(w, 2).sum())(w).tolist()
      ([-1.0, 0.0, 1.0], [0.0, 1.0, 1.0])
    """
    if bits < 2:
        raise ValueError(f"wrpn: bits={bits} leaves none beside the sign; use 2 or more, or xnor for one bit")
    n = 2 ** (bits - 1) - 1
    return (round_through(n * clip_outside(w, -1, 1)) / n).astype(w.dtype)
