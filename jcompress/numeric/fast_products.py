"""Products with matrices of n parameters in n log n steps: circulant, skew-circulant, Hadamard, cosine."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

_RADIX = 16


def circulant(x: jax.Array, v: jax.Array) -> jax.Array:
    """``x @ C`` with ``C[i, j] = v[(j - i) mod n]``: a circular convolution along the last axis, by Fourier transforms.

    Args:
      x: float (..., n).
      v: float (n,), or as many as ``x`` has.
    """
    n = v.shape[-1]
    return jnp.fft.irfft(jnp.fft.rfft(x) * jnp.fft.rfft(v), n) if n and x.size else x * v


def skew_circulant(x: jax.Array, v: jax.Array) -> jax.Array:
    """``x @ S``, ``S[i, j] = v[j - i]`` for ``j >= i`` and ``-v[j - i + n]`` below: what leaves comes back negated."""
    n = v.shape[-1]
    if not n or not x.size:
        return x * v
    whole = jnp.fft.irfft(jnp.fft.rfft(x, 2 * n) * jnp.fft.rfft(v, 2 * n), 2 * n)
    return whole[..., :n] - whole[..., n:]


def walsh(x: jax.Array) -> jax.Array:
    """``x @ H / sqrt(n)`` along the last axis, ``H`` Sylvester's Hadamard matrix; ``n`` is a power of two.

    The matrix is a Kronecker product of small ones: one product for each, of 16 columns, and no butterflies, whose
    passes over memory would take longer.
    """
    n, lead = x.shape[-1], x.shape[:-1]
    if not x.size:
        return x
    done, y = 1, x
    while done < n:
        radix = min(_RADIX, n // done)
        y = y.reshape(*lead, n // (done * radix), radix, done)
        y = jnp.einsum("...ajb,jk->...akb", y, _sylvester(radix, x.dtype), precision=jax.lax.Precision.HIGHEST)
        done *= radix
    return y.reshape(x.shape)


def _sylvester(n: int, dtype: jnp.dtype) -> jax.Array:
    bits = np.arange(n)[:, None] & np.arange(n)
    parity = sum((bits >> i) & 1 for i in range(max(n.bit_length(), 1))) % 2
    return jnp.asarray((1 - 2 * parity) / math.sqrt(n), dtype)


def cosine_matrix(n: int) -> jax.Array:
    """The orthonormal cosine transform (n, n), frequencies along the rows."""
    k, i = jnp.arange(n)[:, None], jnp.arange(n)[None]
    rows = jnp.cos(jnp.pi * ((2 * i + 1) * k % (4 * max(n, 1))) / (2 * max(n, 1)))
    return rows * jnp.where(k == 0, 1.0, math.sqrt(2.0)) / math.sqrt(max(n, 1))


def cosine(x: jax.Array, inverse: bool = False) -> jax.Array:
    """The orthonormal cosine transform along the last axis, or its inverse."""
    turn = jax.scipy.fft.idct if inverse else jax.scipy.fft.dct
    return turn(x, type=2, norm="ortho") if x.size else x
