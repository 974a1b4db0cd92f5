"""Stochastic rounding."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core
from jcompress.core import Context, Method
from jcompress.formats import Quantized
from jcompress.formats.quantized import nearest, spread


@dataclasses.dataclass(frozen=True)
class Stochastic(Method):
    """Round up or down at random, so that the expectation is the weight itself, on the grid of any quantizer.

    Between two neighbouring levels ``a <= w < b`` the result is ``b`` with probability ``(w - a) / (b - a)``, so it is
    unbiased inside the range, with variance at most ``(b - a)**2 / 4``; outside, the code of the end is certain
    (Gupta et al. 2015, arXiv:1502.02551). Needs ``key``.

    Attributes:
      method: any method that gives a :class:`jcompress.formats.Quantized`; its scales are taken as they are.

    Raises:
      ValueError: if the method gives another node, or a grid of one symmetric bit.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> method = jc.quantize.Stochastic(jc.quantize.FixedPoint(bits=8, fraction=0))
      >>> node = method(jnp.full(10_000, 0.3), jc.Context(key=jax.random.key(0)))
      >>> bool(abs(node.materialize().mean() - 0.3) < 0.02)
      True
    """

    method: Method

    reads: ClassVar[tuple[str, ...]] = ("key",)
    wraps: ClassVar[tuple[str, ...]] = ("method",)

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Quantized:
        """The node for one array."""
        inner, own = jax.random.split(context.key)
        node = core.fit(self.method, [w], [dataclasses.replace(context, key=inner)])[0]
        signs = isinstance(node, Quantized) and node.bits == 1 and node.zero is None and node.table is None
        if not isinstance(node, Quantized) or signs or core.is_node(node.zero):
            raise ValueError(
                f"{context.path}: {self!r} rounds on grids of two bits or more and whole zero points, found {node!r}"
            )
        scale = spread(core.dense(node.scale).astype(jnp.float32), node.codes, node.group_size)
        scaled = w.astype(jnp.float32) / scale
        rounded = _rounded(scaled, jax.random.uniform(own, w.shape, jnp.float32), node)
        zero = None if node.zero is None else spread(node.zero.astype(jnp.float32), node.codes, node.group_size)
        codes = nearest(rounded, 1.0, zero, node.bits, node.table, jnp.dtype(node.codes.dtype))
        return dataclasses.replace(node, codes=codes)


def _rounded(scaled: jax.Array, noise: jax.Array, node: Quantized) -> jax.Array:
    """One of the two levels next to each number, the upper where ``noise`` is below the part of the way to it."""
    if node.table is not None:
        levels = jnp.asarray(node.table, jnp.float32)
        lower = jnp.clip(jnp.searchsorted(levels, scaled, side="right") - 1, 0, len(node.table) - 2)
        a, b = levels[lower], levels[lower + 1]
        return jnp.where(noise * (b - a) < scaled - a, b, a)
    step = _float_step(scaled, node.codes.dtype) if jnp.issubdtype(node.codes.dtype, jnp.floating) else 1.0
    lower = jnp.floor(scaled / step)
    return (lower + (noise < scaled / step - lower)) * step


def _float_step(x: jax.Array, dtype: Any) -> jax.Array:
    """The distance between neighbouring floats of a narrow dtype about ``x``; a power of two."""
    info = jnp.finfo(dtype)
    exponent = jnp.frexp(jnp.abs(x))[1] - 1
    least = np.frexp(float(info.smallest_normal))[1] - 1
    return jnp.exp2((jnp.maximum(exponent, least) - info.nmant).astype(jnp.float32))
