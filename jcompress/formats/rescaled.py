"""Arrays times a held scale for each input."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax

from jcompress import core
from jcompress.core import Compressed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Rescaled(Compressed):
    """``scale * values``: what is kept was multiplied by ``1 / scale`` before it was compressed.

    Attributes:
      values: float array, or a node that stands for one.
      scale: a node that is held, such as ``Frozen``, for an array that broadcasts against ``values``: one number for
        each contracted input.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> scale = jc.formats.Frozen.of(jnp.array([[2.0], [0.5]], jnp.bfloat16))
      >>> node = jc.formats.Rescaled(values=jnp.ones((2, 2)), scale=scale)
      >>> node.materialize().tolist(), node.nbits()
      ([[2.0, 2.0], [0.5, 0.5]], 160)
    """

    values: Any
    scale: Any
    elementwise: ClassVar[tuple[str, ...]] = ("values",)

    def materialize(self, *, key: jax.Array | None = None) -> jax.Array:
        values = core.dense(self.values, key=key)
        return values * core.dense(self.scale).astype(values.dtype)

    def project(self, w: jax.Array, where: jax.Array | None = None) -> Rescaled:
        """The values refitted to ``w / scale``: least squares there, where inputs that matter count for more."""
        inner = w / core.dense(self.scale).astype(w.dtype)
        values = core.refitted(self.values, inner, where)
        return dataclasses.replace(self, values=values)
