"""Arrays whose inputs are rotated by a randomized Hadamard matrix."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core
from jcompress.core import Compressed
from jcompress.numeric import scaling


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Rotated(Compressed):
    """``R @ values`` with ``R = diag(signs) H / sqrt(n)``: orthogonal, and applied along axis -2 in n log n steps.

    ``H`` is a Hadamard matrix where the length is a power of two times an order that :func:`hadamard_order` knows, 12
    and 20 among them; else as many of the largest power of two that divides it, along the diagonal.

    Attributes:
      values: float array, or a node that stands for one.
      signs: boolean array (..., n, 1); True is a minus.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> node = jc.formats.Rotated(values=jnp.array([[2.0], [0.0]]), signs=jnp.array([[False], [True]]))
      >>> node.materialize().round(3).tolist()
      [[1.4140000343322754], [-1.4140000343322754]]
    """

    values: Any
    signs: Any
    elementwise: ClassVar[tuple[str, ...]] = ()

    def materialize(self, *, key: jax.Array | None = None) -> jax.Array:
        values = core.dense(self.values, key=key)
        rotated = hadamard(values.astype(jnp.float32))
        return scaling.inside(jnp.where(self.signs, -rotated, rotated)).astype(values.dtype)

    def rotate(self, w: jax.Array) -> jax.Array:
        """``R^T w``, in float32: what the values stand for."""
        w = w.astype(jnp.float32)
        return hadamard(jnp.where(self.signs, -w, w), transpose=True)

    def project(self, w: jax.Array, where: jax.Array | None = None) -> Rotated:
        """Least squares, since the rotation keeps lengths. Entries off ``where`` count as zeros."""
        inner = self.rotate(w if where is None else jnp.where(where, w, jnp.zeros_like(w))).astype(w.dtype)
        return dataclasses.replace(self, values=core.refitted(self.values, inner))


@partial(jax.jit, static_argnames="transpose")
def hadamard(x: jax.Array, transpose: bool = False) -> jax.Array:
    """``H x / sqrt(n)`` or ``H^T x / sqrt(n)`` along axis -2, by the fast Walsh-Hadamard transform.

    Args:
      x: float32 (..., n, m).
      transpose: whether the transpose is applied, which is the inverse.

    Example:
      >>> import jax.numpy as jnp
      >>> hadamard(jnp.eye(2)).round(3).tolist()
      [[0.7070000171661377, 0.7070000171661377], [0.7070000171661377, -0.7070000171661377]]

    Reference: Sylvester's doubling; Paley (1933) for orders that are not powers of two.
    """
    *lead, n, m = x.shape
    if not x.size:
        return x
    order = hadamard_order(n)
    small = paley(order) if order > 1 else np.ones((1, 1))
    blocks, power = (1, n // order) if order else (n // (n & -n), n & -n)
    # H = Sylvester (power) x small: butterflies along one axis, a small product along the other.
    y = x.reshape(*lead, blocks, power, len(small), m) * (power * len(small)) ** -0.5  # before sums, which may overflow
    step = 1
    while step < power:
        pairs = y.reshape(*lead, blocks, power // (2 * step), 2, step, len(small), m)
        a, b = pairs[..., 0, :, :, :], pairs[..., 1, :, :, :]
        y = jnp.stack([a + b, a - b], axis=-4).reshape(y.shape)
        step *= 2
    if len(small) > 1:
        product = jnp.asarray(small.T if transpose else small, x.dtype)
        y = jnp.einsum("ij,...jm->...im", product, y, precision=jax.lax.Precision.HIGHEST)
    return y.reshape(x.shape)


def hadamard_order(n: int) -> int:
    """The order ``m`` with ``n = 2**a * m``: 1, the smallest such that Paley's construction gives, or 0 for none."""
    odd = n // (n & -n)
    if odd == 1:
        return 1
    orders = (odd * 2**a for a in range(2, (n & -n).bit_length()))
    return next((m for m in orders if m <= 256 and _is_prime(m - 1)), 0)


def paley(order: int) -> np.ndarray:
    """The Hadamard matrix of an order ``q + 1``, ``q`` a prime that leaves 3 over 4."""
    q = order - 1
    squares = {i * i % q for i in range(1, q)}
    symbol = np.array([0] + [1 if i in squares else -1 for i in range(1, q)])
    skew = np.zeros((order, order))
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = symbol[(np.arange(q)[:, None] - np.arange(q)) % q]
    return skew + np.eye(order)


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % i for i in range(2, int(n**0.5) + 1))
