"""Weight sharing by one-dimensional k-means."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core
from jcompress.core import Context, Method
from jcompress.formats import Codebook
from jcompress.numeric import scaling
from jcompress.numeric.batches import batches
from jcompress.numeric.blocks import blocked
from jcompress.share import outputs, vectors, weighted
from jcompress.share.optimal import optimal_codebook
from jcompress.share.scalars import cluster_means, nearest, scalar_codebook


@dataclasses.dataclass(frozen=True)
class KMeans(Method):
    """Give every weight one of a few shared values (Han et al. 2016, arXiv:1510.00149), or every block one of a few.

    Minimizes ``sum (w - codebook[index])**2``. In one dimension clusters are intervals, and the optimum is a shortest
    path (Wang & Song 2011; Gronlund et al. 2017, arXiv:1701.07204): it is found by dynamic programming on a histogram
    whose bins are narrow where weights crowd, as a rule within a percent of the least error, and then every shared
    value becomes the mean of its weights. Above 512 clusters the start has the point density of high resolution, and
    Lloyd's algorithm goes on from there.

    With a block, words are vectors (product quantization: Jegou et al. 2011; Gong et al. 2014, arXiv:1412.6115; of
    networks: Stock et al. 2020, arXiv:1907.05686): ``(8, 1)`` for 8 inputs of one output, ``(4, 4)`` for squares,
    ``(3, 3, 1, 1)`` for the filters of a convolution. ``jc.residual(KMeans(...), KMeans(...))`` is residual
    quantization, with ``sweeps=3`` additive. Those of one codebook for all layers (LegoNet, Yang et al. 2019,
    arXiv:1905.10854, in blocks; Son et al. 2018, in filters) take ``scope="global"``.

    Attributes:
      clusters: the number of shared values or words, at most 65,536.
      scope: ``"leaf"``, a codebook for each leaf, or ``"global"``, one for all leaves of the rule: the first
        one's node owns it, and the others refer to it.
      iterations: the most rounds of Lloyd's algorithm; it stops when no value moves. Of single values they run on the
        histogram.
      exact: whether to find the optimum of the values themselves, in float64. That runs on the host, so it works
        outside ``jit`` only, and gathers a sharded leaf.
      block: the lengths of a block along the last axes, the inputs and outputs; () for single values.
      weigh: how much an error matters. A statistic of each weight, ``"hessian_diagonal"`` or ``"grad_square"``:
        ``sum h (w - c)**2``, with weighted means (Choi et al. 2017, arXiv:1612.01543). Or ``"gram"``, the error of the
        layer's outputs, ``tr(dW^T gram dW)``: words are then taken for one input after the other, each making up for
        the errors of all others, and fitted to the outputs; what is sharded is gathered. A few inputs that hold most of
        the energy would take most of the words: turn the basis first, ``Rotation(KMeans(..., weigh="gram"))``.
      price: what a bit of an index is worth, as a share of a weight's mean square, >= 0: entropy-constrained (Chou,
        Lookabaugh & Gray 1989; of networks: Choi et al.). Bits are ideal code lengths, which ``jc.save(path, tree,
        coded=True)`` comes to. Many clusters at a price do better than few at none.

    Raises:
      ValueError: for fewer than 1 or more than 65,536 clusters, ``exact`` under ``jit``, of blocks, with weights or a
        price, a block that does not tile the array, or a statistic that is missing.

    Single values with a weight each are found as those without, near the optimum. With ``"gram"``, a block or a price
    it starts from the codebook without and never leads away from it in what it minimizes.

    Memory beyond the indices is small, for one leaf and for many of a rule: counts and totals are taken a piece at a
    time. Of sharded leaves only counts, a histogram of 4,096 bins to 16,384 by the number of clusters, totals and
    codebooks move between devices.
    Where a mask stands around the array, only kept weights count. An array with fewer distinct values than
    clusters is represented exactly.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> node = jc.share.KMeans(clusters=2, exact=True)(jnp.array([0.0, 1.0, 10.0, 12.0]))
      >>> node.materialize().tolist()
      [0.5, 0.5, 11.0, 11.0]
    """

    clusters: int = 16
    scope: Literal["leaf", "global"] = "leaf"
    iterations: int = 100
    exact: bool = False
    block: tuple[int, ...] = ()
    weigh: Literal["hessian_diagonal", "grad_square", "gram"] | None = None
    price: Any = 0.0

    whole: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.clusters, (int, np.integer)) or not 1 <= self.clusters <= 65_536:
            raise ValueError(f"KMeans: clusters={self.clusters!r} is not an integer from 1 to 65536")
        if self.scope not in ("leaf", "global"):
            raise ValueError(f"KMeans: scope={self.scope!r} is unknown; use 'leaf' or 'global'")
        if self.iterations < 0:
            raise ValueError(f"KMeans: iterations={self.iterations} must not be negative")
        if not isinstance(self.block, tuple) or not all(isinstance(n, (int, np.integer)) and n > 0 for n in self.block):
            raise ValueError(f"KMeans: block={self.block!r} is no tuple of positive integers, such as (8, 1)")
        if self.block and self.exact:
            raise ValueError("KMeans: exact=True is for single values; leave it out, or the block")
        if self.weigh not in (None, "hessian_diagonal", "grad_square", "gram"):
            raise ValueError(
                f"KMeans: weigh={self.weigh!r}, expected 'hessian_diagonal', 'grad_square', 'gram' or None"
            )
        if isinstance(self.price, (int, float)) and not self.price >= 0:
            raise ValueError(f"KMeans: price={self.price} must be at least 0")
        if self.exact and self._weighs:
            raise ValueError("KMeans: exact=True knows no weights and no price; leave it out, or weigh and price")

    @property
    def _weighs(self) -> bool:
        return self.weigh is not None or not self._is_free

    @property
    def _descends(self) -> bool:
        """Whether words are found by steps from others: single values with a weight each have their optimum at once."""
        return self._weighs and not (self._is_free and not self.block and self.weigh != "gram")

    @property
    def _is_free(self) -> bool:
        return isinstance(self.price, (int, float)) and bool(self.price == 0)

    @property
    def needs(self) -> tuple[str, ...]:
        """The statistic that weighs."""
        return () if self.weigh is None else (f"stats.{self.weigh}",)

    def check(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise if the blocks do not tile the array."""
        vectors.check_block(path, self.block, shape)

    @property
    def joint(self) -> bool:
        """Whether one codebook serves all leaves of the rule."""
        return self.scope == "global"

    def fit(self, arrays: Sequence[jax.Array], contexts: Sequence[Context]) -> list[Codebook]:
        """One node for each array of the rule."""
        if self._descends:
            weigh = None if self.block or self.weigh == "gram" else self.weigh
            start = dataclasses.replace(self, weigh=weigh, price=0.0)
            return self._descended(arrays, contexts, start.fit(arrays, contexts))
        if self.block:
            return self._fit_blocks(arrays, contexts)
        xs = list(arrays)
        wheres = [
            None if c.where is None else jnp.broadcast_to(c.where, w.shape)
            for w, c in zip(arrays, contexts, strict=True)
        ]
        if self.weigh is not None and any(x.size for x in xs):
            wheres = list(weighted.importance(self.weigh, arrays, contexts))
        if not sum(x.size for x in xs):
            codebook, unit = jnp.zeros(self.clusters, jnp.float32), scaling.ONE
        elif self.exact:
            codebook, unit = self._optimum(xs, wheres, contexts[0].path), scaling.ONE
        else:
            unit = scaling.unit(xs)
            codebook = scalar_codebook(
                [(x, where) for x, _, where in _triples(xs, xs, wheres)], unit, self.clusters, self.iterations
            )
        indices = [_indices(w, codebook, unit, self._index_dtype) for w in arrays]
        codebook = _means(codebook, _triples(xs, indices, wheres), unit)
        return [
            Codebook(index, self._shared(unit.multiply(codebook).astype(w.dtype), len(arrays)), self.clusters, w.ndim)
            for index, w in zip(indices, arrays, strict=True)
        ]

    def _fit_blocks(self, arrays: Sequence[jax.Array], contexts: Sequence[Context]) -> list[Codebook]:
        """The same with blocks for words."""
        for w, context in zip(arrays, contexts, strict=True):
            self.check(context.path, w.shape, w.dtype)
        unit, shown = scaling.unit(arrays), None
        rows = [blocked(unit.divide(w), self.block) for w in arrays]
        if any(c.where is not None for c in contexts):
            wheres = [jnp.bool_(True) if c.where is None else c.where for c in contexts]
            shown = [blocked(jnp.broadcast_to(m, w.shape), self.block) for m, w in zip(wheres, arrays, strict=True)]
        words = jnp.zeros((self.clusters, math.prod(self.block)), jnp.float32)
        if sum(x.size for x in rows):
            words = vectors.fitted(rows, shown, self.clusters, self.iterations)
        places = [vectors.assigned(x, None if shown is None else shown[i], words) for i, x in enumerate(rows)]
        words = vectors.centred(words, rows, shown, places)
        return [
            Codebook(
                place.astype(self._index_dtype),
                self._shared(unit.multiply(words).astype(w.dtype), len(arrays)),
                self.clusters,
                w.ndim,
                tuple(self.block),
            )
            for place, w in zip(places, arrays, strict=True)
        ]

    def _descended(
        self, arrays: Sequence[jax.Array], contexts: Sequence[Context], nodes: list[Codebook]
    ) -> list[Codebook]:
        """The nodes with words and indices that cost less, by what weighs."""
        if not sum(w.size for w in arrays):
            return nodes
        unit, indices = scaling.unit(arrays), [node.indices for node in nodes]
        words = unit.divide(core.dense(nodes[0].codebook)).reshape(self.clusters, -1)
        if self.weigh == "gram":
            shape = (-1, math.prod(self.block[:-1]), self.block[-1] if self.block else 1)
            given = zip(arrays, contexts, indices, strict=True)
            leaves = [outputs.product(*one, self.block, unit) for one in given]
            words, leaves = outputs.descended(words.reshape(shape), leaves, self.price)
            found = zip(arrays, contexts, leaves, indices, strict=True)
            indices = [outputs.restored(w, context, leaf, index) for w, context, leaf, index in found]
        else:
            weights = [self._rows(h) for h in weighted.importance(self.weigh, arrays, contexts)]
            rows = [self._rows(unit.divide(w)) for w in arrays]
            words, places = weighted.refined(words, rows, weights, self.price, self.iterations)
            pairs = zip(places, indices, strict=True)
            indices = [place.reshape(index.shape).astype(index.dtype) for place, index in pairs]
        words = unit.multiply(words).reshape(core.dense(nodes[0].codebook).shape)
        return [
            dataclasses.replace(node, indices=index, codebook=self._shared(words.astype(w.dtype), len(arrays)))
            for node, index, w in zip(nodes, indices, arrays, strict=True)
        ]

    def _rows(self, x: jax.Array) -> jax.Array:
        return blocked(x, self.block) if self.block else x[..., None]

    def _shared(self, codebook: jax.Array, leaves: int) -> Any:
        """A codebook, marked as common to all leaves of its dtype where there are several."""
        return core.Common(codebook, (codebook.dtype.name,)) if leaves > 1 else codebook

    @property
    def _index_dtype(self) -> Any:
        return jnp.uint8 if self.clusters <= 256 else jnp.uint16

    def _optimum(self, xs: list[jax.Array], wheres: list[jax.Array | None], path: str) -> jax.Array:
        if not all(core.is_concrete(x) for x in xs):
            raise ValueError(
                f"{path}: KMeans(exact=True) reads the values, so it works outside jit only; use exact=False"
            )
        kept = [
            np.ravel(x) if where is None else np.asarray(x)[np.asarray(where)]
            for x, where in zip(xs, wheres, strict=True)
        ]
        return jnp.asarray(optimal_codebook(np.concatenate(kept), self.clusters))


def _triples(xs: list[jax.Array], indices: list[jax.Array], wheres: list[jax.Array | None]) -> list[Any]:
    """Values, their indices and masks: many leaves as few arrays, which need not compile as many loops."""
    layout = batches(xs)
    if len(layout) == len(xs):
        return list(zip(xs, indices, wheres, strict=True))
    if all(where is None for where in wheres):
        return [(b.pack(xs), b.pack(indices), None) for b in layout]
    shown = [jnp.ones(x.shape, jnp.bool_) if where is None else where for x, where in zip(xs, wheres, strict=True)]
    return [(b.pack(xs), b.pack(indices), b.pack(shown)) for b in layout]


_indices = jax.jit(nearest, static_argnames="dtype")
_means = jax.jit(cluster_means)
