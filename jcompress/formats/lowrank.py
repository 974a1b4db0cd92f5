"""Products of two thin matrices."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Compressed
from jcompress.numeric import scaling


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class LowRank(Compressed):
    """A matrix ``u @ v`` of low rank; convolution kernels count as (window and input) x output matrices.

    Attributes:
      u: float array (..., in, rank), or a node that stands for one; for a convolution (window..., in, rank).
      v: float array (..., rank, out), or a node that stands for one. Leading axes of ``v`` are stacked layers.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> node = jc.formats.LowRank(u=jnp.ones((64, 2)), v=jnp.ones((2, 32)))
      >>> node.materialize().shape, node.nbits()
      ((64, 32), 6144)
    """

    u: Any
    v: Any
    linear: ClassVar[bool] = False

    def materialize(self, *, key: jax.Array | None = None) -> jax.Array:
        u, v = core.dense(self.u, key=key), core.dense(self.v, key=key)
        batch = v.shape[:-2]
        matrix = jnp.matmul(u.reshape(*batch, -1, u.shape[-1]), v, precision=jax.lax.Precision.HIGHEST)
        return matrix.reshape(*u.shape[:-1], v.shape[-1])

    def project(self, w: jax.Array, where: jax.Array | None = None) -> LowRank:
        """The best factors of this rank by a singular value decomposition; ``where`` is not used."""
        batch, rank = core.dense(self.v).shape[:-2], core.dense(self.v).shape[-2]
        u, v = truncated_svd(w.reshape(*batch, -1, w.shape[-1]), rank)
        u = u.reshape(*w.shape[:-1], rank)
        return LowRank(u=core.refitted(self.u, u), v=core.refitted(self.v, v))


def truncated_svd(w: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """Factors ``u`` (..., m, rank) and ``v`` (..., rank, n) of the best approximation, sharing the singular values.

    Decomposed in units of their own: near the ends of float32 the squares of entries would leave it.
    """
    w = core.widened(w)
    wide = w.astype(jnp.promote_types(w.dtype, jnp.float32))
    if not w.size or wide.dtype != jnp.float32:
        unit = scaling.ONE
    else:
        unit = scaling.of(jnp.max(jnp.abs(wide), axis=(-2, -1), keepdims=True))
        wide = unit.divide(wide)
    u, s, v = jnp.linalg.svd(wide, full_matrices=False)
    root = jnp.sqrt(s[..., :rank])
    u, v = u[..., :rank] * root[..., None, :] * unit.root, root[..., :, None] * v[..., :rank, :] * unit.root
    return u.astype(w.dtype), v.astype(w.dtype)
