"""Indices into a small table of values, or of blocks of values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core
from jcompress.core import Compressed, Relaying
from jcompress.numeric.blocks import blocked, unblocked
from jcompress.numeric.packing import Expected
from jcompress.numeric.pieces import totals


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Codebook(Compressed):
    """Every entry is one of a few shared values, ``codebook[indices]``, or every block one of a few shared blocks.

    With a block of ``(4, 4)``, the rows of the codebook are blocks of 4 inputs and 4 outputs, their entries in the
    order of the array, and an index stands for 16 entries.

    Attributes:
      indices: uint8 or uint16 array in the shape of the dense one, its last axes divided by the block.
      codebook: float array (..., clusters), or (..., clusters, entries of a block), or a node that stands for one;
        trainable. Leading axes are stacked layers.
      clusters: the number of shared values or blocks.
      ndim: axes of the dense array of one layer; ``indices`` has more where layers are stacked.
      block: the lengths of a block along the last axes; () for single values.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> indices = jnp.array([[0, 1], [2, 1]], jnp.uint8)
      >>> node = jc.formats.Codebook(indices=indices, codebook=jnp.array([-1.0, 0.0, 2.0]), clusters=3)
      >>> node.materialize().tolist(), node.nbits()
      ([[-1.0, 0.0], [2.0, 0.0]], 104)
      >>> rows = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> blocks = jc.formats.Codebook(indices=jnp.array([[1, 0]], jnp.uint8), codebook=rows, clusters=2, block=(2,))
      >>> blocks.materialize().tolist(), blocks.nbits()
      ([[3.0, 4.0, 1.0, 2.0]], 130)
    """

    indices: Any
    codebook: Any
    clusters: int = dataclasses.field(metadata={"static": True})
    ndim: int = dataclasses.field(default=2, metadata={"static": True})
    block: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})

    @property
    def elementwise(self) -> tuple[str, ...]:  # type: ignore[override]  # it depends on the block
        """Indices of single values are laid out like the dense array."""
        return () if self.block else ("indices",)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense array, known without the codebook, which may be another node's."""
        sizes, whole = tuple(self.indices.shape), self.indices.ndim - len(self.block)
        return *sizes[:whole], *(n * b for n, b in zip(sizes[whole:], self.block, strict=True))

    def materialize(self, *, key: jax.Array | None = None) -> jax.Array:
        codebook = core.dense(self.codebook, key=key)
        expected = (*self._layers, self.clusters, *([math.prod(self.block)] if self.block else []))
        if codebook.shape != expected:
            raise ValueError(f"Codebook: found a codebook of shape {codebook.shape}, expected {expected}")
        if not self.block:
            return jnp.take(codebook.reshape(-1), self._places(), mode="clip")
        rows = codebook.reshape(-1, math.prod(self.block))
        return unblocked(jnp.take(rows, self._places(), axis=0, mode="clip"), self.block)

    def project(self, w: jax.Array, where: jax.Array | None = None) -> Codebook:
        """Every shared value becomes the mean of its entries; one without entries becomes 0."""
        return self._of_means(*self._totals(w, where), w.dtype)

    @classmethod
    def project_together(
        cls, nodes: Sequence[Any], ws: Sequence[jax.Array], wheres: Sequence[jax.Array | None]
    ) -> list[Any]:
        """Where the codebooks are one, its values become the means of their entries in all arrays."""
        if not all(isinstance(node.codebook, core.Common) for node in nodes):
            return super().project_together(nodes, ws, wheres)
        found = [node._totals(w, where) for node, w, where in zip(nodes, ws, wheres, strict=True)]
        total, count = (sum(column) for column in zip(*found, strict=True))
        return [node._of_means(total, count, ws[0].dtype) for node in nodes]

    def _totals(self, w: jax.Array, where: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        clusters = math.prod(self._layers) * self.clusters
        if not self.block:
            return cluster_totals(w, self._places(), clusters, where)
        where = None if where is None else blocked(jnp.broadcast_to(where, w.shape), self.block)
        return row_totals(blocked(w, self.block), self._places(), clusters, where)

    def _of_means(self, total: jax.Array, count: jax.Array, dtype: Any) -> Codebook:
        mean = jnp.where(count > 0, total / jnp.maximum(count, 1.0), 0.0).astype(dtype)
        mean = mean.reshape(*self._layers, self.clusters, *total.shape[1:])
        return dataclasses.replace(self, codebook=core.refitted(self.codebook, mean))

    def relaid(self, relaying: Relaying, /) -> Codebook | None:
        if self.block or self._layers:
            return None
        indices = relaying.array(self.indices)
        return dataclasses.replace(self, indices=indices, ndim=indices.ndim)

    @property
    def _layers(self) -> tuple[int, ...]:
        """The leading axes of stacked layers, each with a codebook of its own."""
        return self.indices.shape[: self.indices.ndim - self.ndim]

    def _places(self) -> jax.Array:
        """Indices into the codebooks of all stacked layers, laid end to end."""
        layers, places = self._layers, self.indices.astype(jnp.int32)
        first = self.clusters * jnp.arange(math.prod(layers), dtype=jnp.int32).reshape(*layers, *[1] * self.ndim)
        return places + first if layers else places

    def widths(self) -> dict[str, int]:
        return {"indices": (self.clusters - 1).bit_length()}

    def shown(self, name: str, where: Any) -> Any:
        """An index is stored if any entry of its block is shown."""
        if name != "indices" or not self.block or where is None:
            return super().shown(name, where)
        if isinstance(where, Expected):
            return Expected()
        return blocked(np.broadcast_to(where, self.shape), self.block).any(-1)


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


def row_totals(
    rows: jax.Array, places: jax.Array, clusters: int, where: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Sum, float32 (clusters, d), and number, (clusters, d) or (clusters, 1), of the rows (..., d) by their cluster."""
    shown = [] if where is None else [where]

    def piece(place: jax.Array, x: jax.Array, *where: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = jnp.where(where[0], x, 0).astype(jnp.float32) if where else x.astype(jnp.float32)
        weight = where[0].astype(jnp.float32) if where else jnp.ones((*place.shape, 1), jnp.float32)
        zeros = jnp.zeros((clusters, x.shape[-1]), jnp.float32)
        counts = jnp.zeros((clusters, weight.shape[-1]), jnp.float32)
        return zeros.at[place].add(x, mode="drop"), counts.at[place].add(weight, mode="drop")

    return totals(piece, places, rows, *shown)
