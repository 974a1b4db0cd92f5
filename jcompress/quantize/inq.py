"""Incremental quantization: a part of the weights is frozen on the grid, and the rest is trained on."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Context, Method
from jcompress.formats import Masked, Quantized, Sum
from jcompress.numeric import scaling
from jcompress.quantize.tables import PowersOfTwo


@dataclasses.dataclass(frozen=True)
class INQ(Method):
    """Quantize the largest weights and freeze them, train the others, and so on until none is left.

    The node is a sum: codes where weights are frozen, and floats, which train, elsewhere. What was frozen the last time
    (``previous``, which ``jc.project`` passes) stays so, bit for bit, with its scales, so the grid must have held ones,
    as :class:`PowersOfTwo` does (Zhou et al. 2017, arXiv:1702.03044: 50, 75, 87.5 and 100 percent are frozen in turn).
    The grid of 5 bits has 15 magnitudes; the paper's has 8, ``grid=PowersOfTwo(bits=5, magnitudes=8)``.
    Once all is frozen the second mask hides everything and stores nothing but itself.

    Attributes:
      free: a method that masks the weights that stay free, such as ``jc.prune.Magnitude(sparsity=s)``, called with one
        over the magnitudes: the ``s`` largest are frozen. Its schedule is that of the paper's parts.
      grid: the method that quantizes.

    Raises:
      ValueError: for a grid that gives no ``Quantized`` node, or one whose scales train.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> method = jc.quantize.INQ(free=jc.prune.Magnitude(sparsity=0.5))
      >>> method(jnp.array([[8.0], [-3.5], [0.75], [0.25]])).materialize()[:, 0].tolist()
      [8.0, -4.0, 0.75, 0.25]
    """

    free: Method
    grid: Method = PowersOfTwo(bits=5)

    wraps: ClassVar[tuple[str, ...]] = ("free", "grid")

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Sum:
        """The node for one array."""
        node = self.grid(w, context)
        if not isinstance(node, Quantized) or core.is_node(node.scale) or core.is_trainable(node.scale):
            raise ValueError(
                f"{context.path}: the grid {self.grid!r} gives {node!r}, expected Quantized with scales that are held; "
                "use PowersOfTwo, or Int(power_of_two=True)"
            )
        frozen = jnp.zeros(w.shape, jnp.bool_)
        if context.previous is not None:
            before = context.previous.terms[0]
            frozen, node = before.mask, before.values.encode(w)
            node = dataclasses.replace(node, codes=jnp.where(frozen, before.values.codes, node.codes))
        rank = jnp.where(frozen, 0, 1 / jnp.maximum(jnp.abs(scaling.unit([w]).divide(w)), 1e-30))
        free = self.free(rank, dataclasses.replace(context, previous=None)).mask & ~frozen
        return Sum((Masked(node, ~free), Masked(jnp.where(free, w, jnp.zeros_like(w)), free)))
