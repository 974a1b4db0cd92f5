"""Indices into a small table of values."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Compressed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Codebook(Compressed):
    """Every entry is one of a few shared values: ``codebook[indices]``.

    Attributes:
      indices: uint8 or uint16 array in the shape of the dense one.
      codebook: float array (..., clusters), or a node that stands for one; trainable. Leading axes are stacked layers.
      clusters: the number of shared values.
      ndim: axes of the dense array of one layer; ``indices`` has more where layers are stacked.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> indices = jnp.array([[0, 1], [2, 1]], jnp.uint8)
      >>> node = jc.formats.Codebook(indices=indices, codebook=jnp.array([-1.0, 0.0, 2.0]), clusters=3)
      >>> node.materialize().tolist(), node.nbits()
      ([[-1.0, 0.0], [2.0, 0.0]], 104)
    """

    indices: Any
    codebook: Any
    clusters: int = dataclasses.field(metadata={"static": True})
    ndim: int = dataclasses.field(default=2, metadata={"static": True})
    elementwise: ClassVar[tuple[str, ...]] = ("indices",)

    def materialize(self, *, key: jax.Array | None = None) -> jax.Array:
        codebook = core.dense(self.codebook, key=key)
        flat = self._flat(self.indices).astype(jnp.int32)
        return jnp.take_along_axis(codebook, flat, axis=-1, mode="clip").reshape(self.indices.shape)

    def project(self, w: jax.Array, where: jax.Array | None = None) -> Codebook:
        """Every shared value becomes the mean of its entries; one without entries becomes 0."""
        weight = None if where is None else self._flat(jnp.broadcast_to(where, w.shape))
        mean = cluster_means(self._flat(w), self._flat(self.indices), self.clusters, weight)
        if core.is_node(self.codebook):
            mean = self.codebook.project(mean)
        return dataclasses.replace(self, codebook=mean)

    def _flat(self, x: jax.Array) -> jax.Array:
        """One row a stacked layer."""
        return x.reshape(*x.shape[: x.ndim - self.ndim], -1)

    def widths(self) -> dict[str, int]:
        return {"indices": (self.clusters - 1).bit_length()}


def cluster_means(w: jax.Array, indices: jax.Array, clusters: int, where: jax.Array | None = None) -> jax.Array:
    """Means (..., clusters) of the entries of ``w`` (..., n) by their cluster."""
    batch = w.shape[:-1]
    x = w.reshape(-1, w.shape[-1]).astype(jnp.float32)
    weight = jnp.ones_like(x) if where is None else where.reshape(x.shape).astype(jnp.float32)
    x = jnp.where(weight > 0, x, 0.0)
    place = indices.reshape(x.shape).astype(jnp.int32) + clusters * jnp.arange(x.shape[0])[:, None]
    segments = clusters * x.shape[0]
    total = jax.ops.segment_sum(x.reshape(-1), place.reshape(-1), segments)
    count = jax.ops.segment_sum(weight.reshape(-1), place.reshape(-1), segments)
    return jnp.where(count > 0, total / jnp.maximum(count, 1.0), 0.0).reshape(*batch, clusters).astype(w.dtype)
