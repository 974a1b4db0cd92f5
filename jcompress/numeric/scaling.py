"""Arrays near the ends of float32: a power of two is taken out of them, once, and put back exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_FAR = 32


class Unit(NamedTuple):
    """A power of four, as its root: the whole one may lie beyond float32.

    Attributes:
      root: float32 powers of two; they broadcast against what is scaled.
    """

    root: jax.Array

    def divide(self, x: jax.Array) -> jax.Array:
        """``x`` in units, float32 unless complex; exact. Numbers below the least normal float are zero, as in XLA."""
        inverse = 1 / self.root
        return (x if jnp.iscomplexobj(x) else x.astype(jnp.float32)) * inverse * inverse

    def multiply(self, x: jax.Array) -> jax.Array:
        """What :meth:`divide` undoes."""
        return x * self.root * self.root

    def saturated(self, x: jax.Array) -> jax.Array:
        """:meth:`multiply`, the greatest number of float32 for what lies beyond."""
        return inside(self.multiply(x))


ONE = Unit(np.float32(1))  # type: ignore[arg-type]  # no array before a backend is chosen


def inside(x: jax.Array) -> jax.Array:
    """The greatest number of the dtype, with its sign, for what is infinite."""
    most = float(jnp.finfo(x.dtype).max)
    return x if jnp.iscomplexobj(x) else jnp.clip(x, -most, most)


def ratio(x: jax.Array, scale: jax.Array | float) -> jax.Array:
    """``x / scale`` where XLA multiplies by the inverse, which is zero for scales above ``2**126``."""
    shift = jnp.where(jnp.abs(scale) > 2.0**100, jnp.float32(2.0**-60), jnp.float32(1))
    return (x * shift) / (scale * shift)


def unit(xs: Sequence[jax.Array]) -> Unit:
    """The unit of arrays that belong together: about their largest magnitude, and 1 if that is no extreme.

    In units no square, sum or ratio of entries leaves float32. Arrays whose largest magnitude lies within ``2**32`` of
    one, and zeros, are left as they are, to the bit.
    """
    sizes = [x for x in xs if x.size]
    if not sizes:
        return ONE
    largest = jnp.stack([jnp.max(jnp.abs(x)).astype(jnp.float32) for x in sizes]).max()
    return of(largest)


def of(largest: jax.Array) -> Unit:
    """The unit of each largest magnitude, float32 of any shape."""
    bits = lax.bitcast_convert_type(largest.astype(jnp.float32), jnp.uint32)
    exponent = (bits >> 23).astype(jnp.int32) - 127
    far = (jnp.abs(exponent) > _FAR) & (bits > 0)
    far = far & (exponent < 128)  # infinities and what is no number have no size
    half = jnp.where(far, exponent // 2, 0)
    return Unit(lax.bitcast_convert_type(((half + 127) << 23).astype(jnp.uint32), jnp.float32))


def comparable(arrays: Sequence[jax.Array], joint: bool) -> list[jax.Array]:
    """Real floats in float32 units, of each array or, if ``joint``, one for all: products of entries stay in range.

    What holds for their order at one scale then holds at every other. Integers, complex and wider floats stay as they
    are.
    """
    narrow = [jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits <= 32 for x in arrays]
    if not joint:
        return [unit([x]).divide(x) if short else x for x, short in zip(arrays, narrow, strict=True)]
    if not all(narrow):
        return list(arrays)
    shared = unit(arrays)
    return [shared.divide(x) for x in arrays]
