"""Arrays whose entries are taken from a few values, each where a function of its place says."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jcompress import core
from jcompress.core import Compressed
from jcompress.formats.codebook import cluster_totals
from jcompress.numeric import fast_products, hashing, scaling


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Gathered(Compressed):
    """``sign[i, j] * values[place[i, j]]``: places and signs are functions of the index, so no bit is spent on them.

    The rule says which. ``"hash"``: both are hashes of a seed and the index, the same on every platform.
    ``"frequency"``: the same for the cosine transform of a kernel's window, the values of each band (the sum of
    frequencies) apart. ``"circulant"``: in each square block of inputs and outputs the entry is that of its diagonal,
    ``values[(j - i) mod block]``; a last block is cut where it leaves the matrix, and with a seed each input has a
    random sign. The gradient of a value is the sum of those of its entries, with their signs.

    Attributes:
      values: float array (..., slots), or a node that stands for one; trainable. Leading axes are stacked layers.
      sizes: the shape of the dense array of one layer.
      rule: ``"hash"``, ``"frequency"`` or ``"circulant"``.
      slots: how many values there are, of each band for ``"frequency"``; for ``"circulant"`` the length of a block.
      seed: of the hash; None for no signs, of ``"circulant"`` only.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> node = jc.formats.Gathered(jnp.array([1.0, 2.0, 3.0]), (3, 3), "circulant", (3,))
      >>> node.materialize().tolist(), node.nbits()
      ([[1.0, 2.0, 3.0], [3.0, 1.0, 2.0], [2.0, 3.0, 1.0]], 96)
    """

    values: Any
    sizes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    rule: Literal["hash", "frequency", "circulant"] = dataclasses.field(metadata={"static": True})
    slots: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    seed: int | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def count(self) -> int:
        """How many values there are for one layer."""
        if self.rule != "circulant":
            return sum(self.slots)
        return math.prod(self.sizes[:-2]) * math.prod(self.blocks) * self.slots[0]

    @property
    def blocks(self) -> tuple[int, int]:
        """How many circulant blocks there are along the inputs and along the outputs."""
        rows, columns = (max(-(-n // self.slots[0]), 1) for n in self.sizes[-2:])
        return rows, columns

    def materialize(self, *, key: jax.Array | None = None) -> jax.Array:
        values = core.dense(self.values, key=key)
        if values.shape[-1:] != (self.count,):
            raise ValueError(f"Gathered: found values {values.shape}, expected (..., {self.count}) for {self.slots}")
        places, minus = self._places()
        found = jnp.take(values, places, axis=-1, mode="clip")
        if minus is not None:
            found = jnp.where(minus, -found, found)
        return self._windowed(found, back=True)

    def project(self, w: jax.Array, where: jax.Array | None = None) -> Gathered:
        """Every value becomes the signed mean of its entries; one without entries becomes 0.

        For ``"frequency"``, entries off ``where`` count as zeros.
        """
        unit = scaling.unit([w])
        return self._of_means(*self._totals(unit.divide(w), where), unit, w.dtype)

    @classmethod
    def project_together(
        cls, nodes: Sequence[Any], ws: Sequence[jax.Array], wheres: Sequence[jax.Array | None]
    ) -> list[Any]:
        """Where the values are one, they become the signed means of their entries in all arrays."""
        if not all(isinstance(node.values, core.Common) for node in nodes):
            return super().project_together(nodes, ws, wheres)
        unit = scaling.unit(ws)
        found = [node._totals(unit.divide(w), where) for node, w, where in zip(nodes, ws, wheres, strict=True)]
        total, count = (sum(column) for column in zip(*found, strict=True))
        return [node._of_means(total, count, unit, ws[0].dtype) for node in nodes]

    def _totals(self, x: jax.Array, where: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Sum and number, float32 (layers..., values), of the signed entries of each value."""
        layers = x.shape[: x.ndim - len(self.sizes)]
        if self.rule == "frequency" and where is not None:
            x, where = jnp.where(where, x, 0), None
        x, (places, minus) = self._windowed(x), self._places()
        first = self.count * jnp.arange(math.prod(layers), dtype=jnp.int32).reshape(*layers, *[1] * len(self.sizes))
        x = x if minus is None else jnp.where(minus, -x, x)
        places = jnp.broadcast_to(places + first if layers else places, x.shape)
        total, count = cluster_totals(x, places, math.prod(layers) * self.count, where)
        return total.reshape(*layers, self.count), count.reshape(*layers, self.count)

    def _of_means(self, total: jax.Array, count: jax.Array, unit: scaling.Unit, dtype: Any) -> Gathered:
        mean = unit.saturated(jnp.where(count > 0, total / jnp.maximum(count, 1), 0)).astype(dtype)
        return dataclasses.replace(self, values=core.refitted(self.values, mean))

    def multiply(self, x: jax.Array) -> jax.Array:
        """``x @ w`` for a circulant matrix ``w``, by Fourier transforms of the blocks of ``x`` (..., inputs)."""
        (rows, columns), block = self.blocks, self.slots[0]
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        values = core.dense(self.values).astype(dtype).reshape(rows, columns, block)
        x = x.astype(dtype)
        if self.seed is not None:
            x = jnp.where(self._flips(), -x, x)
        x = jnp.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, rows * block - self.sizes[-2])])
        x = x.reshape(*x.shape[:-1], rows, block)
        if rows == columns == 1:
            y = fast_products.circulant(x, values[0])
        else:
            y = jnp.einsum("...pf,pqf->...qf", jnp.fft.rfft(x), jnp.fft.rfft(values))
            y = jnp.fft.irfft(y, block)
        return y.reshape(*x.shape[:-2], columns * block)[..., : self.sizes[-1]]

    def _places(self) -> tuple[jax.Array, jax.Array | None]:
        """The place among the values of each entry of one layer, int32, and which have a minus, if any."""
        if self.rule == "circulant":
            minus = None if self.seed is None else self._flips()[:, None]
            return self._diagonals(), minus
        if self.seed is None:
            raise ValueError(f"Gathered: rule={self.rule!r} needs a seed")
        found = hashing.hashes(self.seed, self.sizes)
        if self.rule == "hash":
            return (found % np.uint32(self.slots[0])).astype(jnp.int32), hashing.minuses(found)
        band = sum(lax.broadcasted_iota(jnp.int32, self.sizes, axis) for axis in range(len(self.sizes) - 2))
        slots = jnp.asarray(self.slots, jnp.uint32)
        starts = jnp.asarray(list(itertools.accumulate(self.slots, initial=0))[:-1], jnp.int32)
        return (found % slots[band]).astype(jnp.int32) + starts[band], hashing.minuses(found)

    def _diagonals(self) -> jax.Array:
        """The place of each entry: the window's position, the block, the diagonal in it."""
        (rows, columns), block = self.blocks, self.slots[0]
        *window, i, j = (lax.broadcasted_iota(jnp.int32, self.sizes, axis) for axis in range(len(self.sizes)))
        place = jnp.int32(0)
        for n, index in zip(self.sizes[:-2], window, strict=True):
            place = place * n + index
        return ((place * rows + i // block) * columns + j // block) * block + (j - i) % block

    def _flips(self) -> jax.Array:
        """The inputs that have a minus."""
        assert self.seed is not None
        return hashing.minuses(hashing.hashes(self.seed, self.sizes[-2:-1]))

    def _windowed(self, x: jax.Array, back: bool = False) -> jax.Array:
        """The window's cosine transform, or its inverse, where values are those of frequencies."""
        if self.rule != "frequency":
            return x
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        for axis, n in enumerate(self.sizes[:-2]):
            turn = fast_products.cosine_matrix(n).astype(wide.dtype)
            place = axis - len(self.sizes)
            moved = jnp.moveaxis(wide, place, -1)
            wide = jnp.moveaxis(jnp.matmul(moved, turn if back else turn.T, precision="highest"), -1, place)
        return wide.astype(x.dtype)
