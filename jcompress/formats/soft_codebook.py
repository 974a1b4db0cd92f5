"""Weights that training draws to a few shared values."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core
from jcompress.core import Compressed
from jcompress.formats.codebook import Codebook
from jcompress.numeric import scaling, soft_clusters
from jcompress.numeric.blocks import blocked, unblocked
from jcompress.numeric.soft_clusters import Gradient


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class SoftCodebook(Compressed):
    """``sum_j a_ij c_j`` with soft assignments ``a = softmax(-||w - c|| / temperature)``, to be trained.

    The words c are the fixed point of soft k-means on the values (DKM; Cho et al. 2021, arXiv:2108.12659), or train
    themselves (Agustsson et al. 2017, arXiv:1704.00648). The temperature, in standard deviations of the values, falls
    from ``temperatures[0]`` to ``temperatures[1]``, geometrically over ``steps`` steps. With a key, which is not drawn
    from, ``materialize`` gives the soft values, those of training; without one each value's nearest word.

    Attributes:
      values: float array, or a node that stands for one.
      codebook: float32 (..., clusters, entries of a block): the words, or where soft k-means starts. Leading axes are
        stacked layers.
      step: int32 (...), the training step; held.
      clusters: the number of words.
      ndim: axes of the dense array of one layer.
      block: the lengths of a block along the last axes; () for single values.
      gradient: how words get theirs: ``"implicit"``, ``"jacobian_free"``, ``"unrolled"`` or ``"trained"``.
      iterations: rounds of soft k-means.
      temperatures: the first and the last.
      steps: the steps from the first to the last.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> node = jc.share.SoftKMeans(clusters=2, temperatures=(0.5, 0.5))(jnp.array([0.0, 1.0, 9.0, 10.0]))
      >>> [round(float(x), 1) for x in node.materialize(key=jax.random.key(0))]
      [0.9, 1.0, 9.0, 9.1]
      >>> type(jc.finalize({"w": node})["w"]).__name__
      'Codebook'
    """

    values: Any
    codebook: Any
    step: Any
    clusters: int = dataclasses.field(kw_only=True, metadata={"static": True})
    ndim: int = dataclasses.field(default=2, metadata={"static": True})
    block: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    gradient: Gradient = dataclasses.field(default="implicit", metadata={"static": True})
    iterations: int = dataclasses.field(default=30, metadata={"static": True})
    temperatures: tuple[float, float] = dataclasses.field(default=(0.1, 0.01), metadata={"static": True})
    steps: int = dataclasses.field(default=1, metadata={"static": True})
    elementwise: ClassVar[tuple[str, ...]] = ("values",)
    linear: ClassVar[bool] = False

    def materialize(self, *, key: jax.Array | None = None) -> jax.Array:
        values, codebook = core.dense(self.values, key=key), core.dense(self.codebook, key=key)
        if not values.size:
            return values
        unit = scaling.unit([jax.lax.stop_gradient(values)])
        rows = unit.divide(self._rows(values))
        call = self._nearest if key is None else self._soft
        made = unit.multiply(jax.vmap(call)(*self._by_layer(rows, unit.divide(codebook))))
        return unblocked(made.reshape(rows.shape), self.block or (1,)).astype(values.dtype).reshape(values.shape)

    def words(self) -> jax.Array:
        """The words, float32 (..., clusters, entries of a block)."""
        values, codebook = core.dense(self.values), core.dense(self.codebook)
        unit = scaling.unit([jax.lax.stop_gradient(values)])
        found = jax.vmap(self._fixed)(*self._by_layer(unit.divide(self._rows(values)), unit.divide(codebook)))
        return unit.multiply(found).reshape(codebook.shape)

    def project(self, w: jax.Array, where: jax.Array | None = None) -> SoftCodebook:
        """The values become ``w``; words start at rows spread over the array."""
        x = w if where is None else jnp.where(where, w, jnp.zeros_like(w))
        unit = scaling.unit([x])
        rows = unit.divide(self._rows(x))
        start = unit.multiply(jax.vmap(self._start)(rows.reshape(math.prod(self._lead), -1, rows.shape[-1])))
        codebook = start.reshape(*self._lead, self.clusters, rows.shape[-1])
        values = core.refitted(self.values, w)
        return dataclasses.replace(self, values=values, codebook=core.refitted(self.codebook, codebook))

    def finalize(self) -> Codebook:
        values, words = core.dense(self.values), self.words() if self.values.size else core.dense(self.codebook)
        rows, unit = self._rows(values), scaling.unit([values])
        x = unit.divide(rows).reshape(math.prod(self._lead), -1, rows.shape[-1])
        book = unit.divide(words).reshape(-1, *words.shape[-2:])
        places = jax.vmap(_places)(x, book).reshape(rows.shape[:-1])
        places = places.reshape(values.shape) if not self.block else places
        words = words if self.block else words[..., 0]
        dtype = jnp.uint8 if self.clusters <= 256 else jnp.uint16
        return Codebook(places.astype(dtype), words.astype(values.dtype), self.clusters, self.ndim, self.block)

    @property
    def _lead(self) -> tuple[int, ...]:
        return tuple(jnp.shape(self.step))

    def _rows(self, values: jax.Array) -> jax.Array:
        x = values.astype(jnp.float32)
        return blocked(x, self.block) if self.block else x[..., None]

    def _by_layer(self, rows: jax.Array, codebook: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        layers, d = math.prod(self._lead), rows.shape[-1]
        return rows.reshape(layers, -1, d), codebook.reshape(layers, self.clusters, d), jnp.reshape(self.step, layers)

    def _temperature(self, x: jax.Array, step: jax.Array) -> jax.Array:
        first, last = self.temperatures
        part = jnp.clip(step / self.steps, 0, 1)
        deviation = jax.lax.stop_gradient(jnp.std(x))
        return first * (last / first) ** part * jnp.where(deviation > 0, deviation, 1)

    def _fixed(self, x: jax.Array, start: jax.Array, step: jax.Array) -> jax.Array:
        return soft_clusters.fixed_words(x, start, self._temperature(x, step), self.iterations, self.gradient)

    def _soft(self, x: jax.Array, start: jax.Array, step: jax.Array) -> jax.Array:
        words = self._fixed(x, start, step)
        soft = soft_clusters.assignments(x, words, self._temperature(x, step))
        return jnp.matmul(soft, words, precision=soft_clusters.HIGHEST)

    def _nearest(self, x: jax.Array, start: jax.Array, step: jax.Array) -> jax.Array:
        words = self._fixed(x, start, step)
        return words[_places(x, words)]

    def _start(self, x: jax.Array) -> jax.Array:
        """Rows by the golden section, moved by k-means at the last temperature: at a high one all words would meet."""
        if not x.size:
            return jnp.zeros((self.clusters, x.shape[-1]), jnp.float32)
        places = (np.arange(self.clusters) * 0.6180339887498949 % 1 * len(x)).astype(np.int32)
        order = jnp.argsort(x[:, 0]) if x.shape[-1] == 1 else jnp.arange(len(x))
        step = lambda _, words: soft_clusters.moved(x, words, self._temperature(x, jnp.int32(self.steps)))  # noqa: E731
        return jax.lax.fori_loop(0, self.iterations, step, x[order[places]])


def _places(x: jax.Array, words: jax.Array) -> jax.Array:
    """The nearest word of each row, int32 (n,)."""
    return jnp.argmin(jnp.sum(jnp.square(x[:, None] - words), axis=-1), axis=-1).astype(jnp.int32)
