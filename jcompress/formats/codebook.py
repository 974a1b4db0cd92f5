"""Indices into a small table of values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Compressed, Relaying
from jcompress.numeric.pieces import totals


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
        return jnp.take(codebook.reshape(-1), self._places(), mode="clip")

    def project(self, w: jax.Array, where: jax.Array | None = None) -> Codebook:
        """Every shared value becomes the mean of its entries; one without entries becomes 0."""
        layers = self.indices.shape[: self.indices.ndim - self.ndim]
        total, count = cluster_totals(w, self._places(), math.prod(layers) * self.clusters, where)
        mean = (
            jnp.where(count > 0, total / jnp.maximum(count, 1.0), 0.0).reshape(*layers, self.clusters).astype(w.dtype)
        )
        return dataclasses.replace(self, codebook=self.codebook.project(mean) if core.is_node(self.codebook) else mean)

    def relaid(self, relaying: Relaying, /) -> Codebook | None:
        if core.is_node(self.codebook) or self.codebook.ndim > 1:
            return None
        indices = relaying.array(self.indices)
        return dataclasses.replace(self, indices=indices, ndim=indices.ndim)

    def _places(self) -> jax.Array:
        """Indices into the codebooks of all stacked layers, laid end to end."""
        layers = self.indices.shape[: self.indices.ndim - self.ndim]
        first = self.clusters * jnp.arange(math.prod(layers), dtype=jnp.int32).reshape(*layers, *[1] * self.ndim)
        return self.indices.astype(jnp.int32) + first if layers else self.indices.astype(jnp.int32)

    def widths(self) -> dict[str, int]:
        return {"indices": (self.clusters - 1).bit_length()}


def cluster_totals(
    w: jax.Array,
    indices: jax.Array | Callable[[jax.Array], jax.Array],
    clusters: int,
    where: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Sum and number, float32 (clusters,), of the entries of ``w`` by their cluster.

    ``indices`` are given for each entry, or by a function of the entries, which is then asked piece by piece. The array
    keeps its axes: flattened, it would be gathered where it is sharded along any axis but the first.
    """
    given = [] if callable(indices) else [indices]
    shown = [] if where is None else [jnp.broadcast_to(where, w.shape)]

    def piece(x: jax.Array, *rest: jax.Array) -> tuple[jax.Array, jax.Array]:
        place = indices(x) if callable(indices) else rest[0]
        x, zeros = x.astype(jnp.float32), jnp.zeros(clusters, jnp.float32)
        weight = rest[-1].astype(jnp.float32) if shown else jnp.ones_like(x)
        x = jnp.where(rest[-1], x, 0.0) if shown else x
        return zeros.at[place].add(x, mode="drop"), zeros.at[place].add(weight, mode="drop")

    return totals(piece, w, *given, *shown)
