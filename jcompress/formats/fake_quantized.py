"""Weights that train along with the grid they are rounded to."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core
from jcompress.core import Compressed
from jcompress.formats.quantized import Quantized, pool, spread
from jcompress.numeric import scaling
from jcompress.numeric.surrogates import clip_outside, round_through, round_with_soft_slope, scaled_gradient

Surrogate = Literal["identity", "soft", "tanh"]
_SOFTNESS = 0.2
_EDGE = 2.0**-21  # so near to an end of the grid, a value counts as outside: more than the rounding of a quotient


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class FakeQuantized(Compressed):
    """``scale * round(clip(values / scale, -n, p))`` with ``n = 2**(bits - 1)`` and ``p = n - 1``, to be trained.

    Forward, the value lies on the grid. Backward, rounding has the derivative of its surrogate:

    ``"identity"``: one, so weights within the grid pass their gradient g on, weights outside pass none, and the scale
    gets ``sum(g * (round(v / s) - v / s))`` over those within, ``sum(g * p)`` and ``-sum(g * n)`` over those outside,
    divided by ``sqrt(N * p)`` for the N weights that share it (LSQ; Esser et al. 2020, arXiv:1902.08153).

    ``"soft"``: that of ``(tanh(k * t) / tanh(k / 2) + 1) / 2`` within each step, t from -1/2 to 1/2 and
    ``k = log(2 / softness - 1)``; the softness is learned, and at 1 the derivative is one (DSQ; Gong et al. 2019,
    arXiv:1908.05033).

    ``"tanh"``: the value is ``scale * (2 * round((u + n) / 2) - n)``, ``u = n * tanh(v) / max |tanh(v)|`` and
    ``n = 2**bits - 1``; rounding has derivative one (DoReFa; Zhou et al. 2016, arXiv:1606.06160, where the scale
    is ``1 / n``).

    Attributes:
      values: float array, or a node that stands for one.
      scale: float32 array, laid out as in :class:`Quantized`.
      softness: float32 array in the shape of the scale, within (0, 1), for ``"soft"``; or None.
      bits: bits a code, 2 to 16; 8 at most for ``"tanh"``, whose levels are a table.
      surrogate: what rounding is, backward.
      axes: the axes along which a scale is shared, negative.
      group_size: rows of axis -2 that share a scale, or None.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> w, scale = jnp.array([[0.6], [9.0]]), jnp.ones((1, 1))
      >>> def value(w):
      ...     return jc.formats.FakeQuantized(w, scale, bits=3).materialize()
      >>> value(w).tolist(), jax.grad(lambda w: value(w).sum())(w).tolist()
      ([[1.0], [3.0]], [[1.0], [0.0]])
    """

    values: Any
    scale: Any
    softness: Any = None
    bits: int = dataclasses.field(kw_only=True, metadata={"static": True})
    surrogate: Surrogate = dataclasses.field(default="identity", metadata={"static": True})
    axes: tuple[int, ...] = dataclasses.field(default=(-2,), metadata={"static": True})
    group_size: int | None = dataclasses.field(default=None, metadata={"static": True})
    elementwise: ClassVar[tuple[str, ...]] = ("values",)

    def materialize(self, *, key: jax.Array | None = None) -> jax.Array:
        values, scale = core.dense(self.values, key=key), core.dense(self.scale, key=key)
        v = values.astype(jnp.float32)
        if self.surrogate == "identity":
            return stepped(v, scale, self.bits, self.axes, self.group_size).astype(values.dtype)
        level, scale = self._levels(v, scale)
        return (self._spread(scale, v) * level).astype(values.dtype)

    def _levels(self, v: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What the scale multiplies, and the scale with the gradient that it is to have."""
        if self.surrogate == "tanh":
            n = 2**self.bits - 1
            return 2 * round_through((n * squashed(v, self.axes) + n) / 2) - n, scale
        n, p = self._ends()
        scale = scaled_gradient(scale, _gradient_factor(v, scale, p))
        clipped = clip_outside(_quotient(v, scale, self.group_size), -n, p)
        if self.softness is None:
            return jnp.round(clipped), scale
        alpha = jnp.clip(core.dense(self.softness), 1e-3, 1 - 1e-3)
        return round_with_soft_slope(clipped, self._spread(jnp.log(2 / alpha - 1), v)), scale

    def _ends(self) -> tuple[int, int]:
        return ends(self.bits, signed=True)

    def _spread(self, scale: jax.Array, like: jax.Array) -> jax.Array:
        return spread(scale, like, self.group_size)

    def project(self, w: jax.Array, where: jax.Array | None = None) -> FakeQuantized:
        """The values become ``w`` and the grid spans their range."""
        x = w.astype(jnp.float32)
        x = x if where is None else jnp.where(where, x, 0.0)
        if self.surrogate == "tanh":
            most = pool(jnp.abs(x), self.axes, self.group_size, jnp.maximum, 0.0)
            top = jnp.minimum(jnp.tanh(most), 0.99)
            unit = scaling.of(most)  # the reciprocal of the greatest numbers is none that XLA keeps
            part = scaling.Unit(self._spread(unit.root, x)).divide(x) / jnp.where(most > 0, unit.divide(most), 1.0)
            values = jnp.arctanh(part * top).astype(w.dtype)
            scale = core.refitted(self.scale, most * (1 / (2**self.bits - 1)))
            return dataclasses.replace(self, values=core.refitted(self.values, values), scale=scale)
        n, p = self._ends()
        high = pool(x, self.axes, self.group_size, jnp.maximum, 0.0)
        low = pool(x, self.axes, self.group_size, jnp.minimum, 0.0)
        scale = positive(jnp.maximum(high * (1 / p), low * (-1 / n)))
        softness = core.refitted(self.softness, jnp.full_like(scale, _SOFTNESS)) if self.surrogate == "soft" else None
        values, scale = core.refitted(self.values, w), core.refitted(self.scale, scale)
        return dataclasses.replace(self, values=values, scale=scale, softness=softness)

    def finalize(self) -> Quantized:
        values = core.dense(self.values)
        levels, scale = self._levels(values.astype(jnp.float32), core.dense(self.scale))
        n, table = 2**self.bits - 1, None
        codes = levels.astype(jnp.int8 if self.bits <= 8 else jnp.int16)
        if self.surrogate == "tanh":
            table = tuple(float(level) for level in range(-n, n + 1, 2))
            codes = ((levels + n) / 2).astype(jnp.uint8)
        return Quantized(
            codes, scale, bits=self.bits, table=table, axes=self.axes, group_size=self.group_size,
            dtype=np.dtype(values.dtype), full_range=table is None,
        )  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def stepped(
    v: jax.Array, scale: jax.Array, bits: int, axes: tuple[int, ...] = (), group_size: int | None = None
) -> jax.Array:
    """``scale * clip(round(v / scale), -n, p)``, signed, with the gradients of learned steps; reverse mode only."""
    n, p = ends(bits, signed=True)
    levels = jnp.clip(jnp.round(_quotient(v, scale, group_size)), -n, p)
    return spread(scale, v, group_size) * levels


def _quotient(v: jax.Array, scale: jax.Array, group_size: int | None) -> jax.Array:
    """``v / scale``, also next to the greatest numbers, whose reciprocals XLA takes for zero."""
    less = jnp.where(scale > 2.0**100, 0.25, 1.0)
    return v * spread(less, v, group_size) / spread(scale * less, v, group_size)


def _stepped_forward(v: jax.Array, scale: jax.Array, *how: Any) -> tuple[jax.Array, tuple]:
    return stepped(v, scale, *how), (v, scale)


def _stepped_backward(bits: int, axes: tuple[int, ...], group_size: int | None, saved: tuple, g: jax.Array) -> tuple:
    v, scale = saved
    n, p = ends(bits, signed=True)
    low, high = -n * (1 - _EDGE), p * (1 - _EDGE)
    inverse = 1 / scale  # a product for each value: a quotient would take most of the time

    def slope(v: jax.Array, g: jax.Array, inverse: jax.Array) -> jax.Array:
        u = v * inverse
        clipped = jnp.clip(u, low, high)
        return g * (jnp.round(clipped) - jnp.where(u == clipped, u, 0.0))

    u = v * spread(inverse, v, group_size)
    if group_size is None and axes == (-2,):
        total = _down(slope, v, g, inverse)
    else:
        total = pool(slope(v, g, spread(inverse, v, group_size)), axes, group_size, jnp.add, 0.0)
    # The zero of weights outside waits for the sums: all that reads the weights then comes before what a step writes
    # in their place, and XLA need not copy them first.
    outside = spread(jnp.minimum(jnp.abs(total), 0.0), v, group_size)
    return jnp.where(u == jnp.clip(u, low, high), g, outside), total * _gradient_factor(v, scale, p)


def _down(slope: Callable[..., jax.Array], v: jax.Array, g: jax.Array, inverse: jax.Array) -> jax.Array:
    """The sum of slopes along axis -2: rows a few at a time as they are computed, and a product for the rest.

    A reduction would do, but XLA's CPU fuses what is computed into it and then walks it column by column.
    """
    *lead, rows, columns = v.shape
    few = next(size for size in (8, 4, 2, 1) if rows % size == 0)
    vs, gs = (x.reshape(*lead, rows // few, few, columns) for x in (v, g))
    x = functools.reduce(jnp.add, (slope(vs[..., i, :], gs[..., i, :], inverse) for i in range(few)))
    several = jnp.ones((4, rows // few), x.dtype)  # a product with one row would be such a reduction again
    return jnp.matmul(several, x, precision=jax.lax.Precision.HIGHEST)[..., :1, :]


stepped.defvjp(_stepped_forward, _stepped_backward)


def ends(bits: int, signed: bool) -> tuple[int, int]:
    """The magnitudes of the least and the largest integer."""
    return (2 ** (bits - 1), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def _gradient_factor(v: jax.Array, scale: jax.Array, p: int) -> float:
    return (max(v.size, 1) / max(scale.size, 1) * p) ** -0.5


def positive(scale: jax.Array) -> jax.Array:
    """Scales fit to divide by: what is not a positive normal number becomes 1."""
    return jnp.where(scale >= jnp.finfo(scale.dtype).tiny, scale, 1.0)


def squashed(v: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """``tanh(v) / max |tanh(v)|``, the maximum over some axes; zeros stay zeros."""
    t = jnp.tanh(v)
    most = jnp.max(jnp.abs(t), axes, keepdims=True, initial=0.0)
    return t / jnp.where(most > 0, most, 1.0)
