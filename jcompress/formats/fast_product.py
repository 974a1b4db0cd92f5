"""Matrices that are products of diagonals, circulants and fast transforms."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Compressed
from jcompress.numeric import fast_products, hashing, scaling

_STEPS = 8
"""Of conjugate gradients towards the best vector with the others as they are."""
_ROWS = 64
"""Of the identity that go through the steps at once, where they may."""
_WITH_VECTOR: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "diagonal": jnp.multiply,
    "circulant": fast_products.circulant,
    "skew": fast_products.skew_circulant,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class FastProduct(Compressed):
    """A sum of products of square matrices that take n numbers, or none, and n log n steps; cut to the array's shape.

    Read from left to right, ``x @ w`` is ``x`` through one step after the other. ``"diagonal"``, ``"circulant"`` and
    ``"skew"`` (circulant, what comes around negated) take the next vector. ``"hadamard"``, ``"cosine"`` and its inverse
    ``"back"`` are orthonormal; ``"permutation"`` is a function of the seed. Adaptive Fastfood, ACDC and matrices of low
    displacement rank are such products. Window and inputs of a convolution count as one axis.

    ``project`` refits one vector after the other in least squares with the others as they are: one sweep that never
    takes the array farther away, and does not find the best vectors at once.

    Attributes:
      vectors: float arrays (..., n, terms), or nodes that stand for them; trainable. Leading axes are stacked layers.
      steps: the names of the steps.
      sizes: the shape of the dense array of one layer.
      seed: of the permutations.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> vectors = jnp.array([[1.0], [2.0]]), jnp.array([[5.0], [7.0]])
      >>> node = jc.formats.FastProduct(vectors, ("diagonal", "circulant"), (2, 2))
      >>> node.materialize().round().tolist(), node.nbits()
      ([[5.0, 7.0], [14.0, 10.0]], 128)
    """

    vectors: tuple[Any, ...]
    steps: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    sizes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    seed: int = dataclasses.field(default=0, metadata={"static": True})
    linear: ClassVar[bool] = False

    def materialize(self, *, key: jax.Array | None = None) -> jax.Array:
        vectors = [core.dense(v, key=key) for v in self.vectors]
        first, *others = [v.astype(jnp.promote_types(v.dtype, jnp.float32)) for v in vectors]
        unit = scaling.unit([first])  # sums of numbers near the largest would pass it
        dense = self._dense_of([unit.divide(first), *others])
        return scaling.inside(unit.saturated(dense).astype(vectors[0].dtype))

    def project(self, w: jax.Array, where: jax.Array | None = None) -> FastProduct:
        """One sweep of alternating least squares, over the entries of ``where`` alone."""
        fitted = self.refitted([core.dense(v) for v in self.vectors], w, where)
        pairs = zip(self.vectors, fitted, strict=True)
        new = tuple(core.refitted(old, v.astype(w.dtype)) for old, v in pairs)
        return dataclasses.replace(self, vectors=new)

    def refitted(
        self, vectors: Sequence[jax.Array], w: jax.Array, where: jax.Array | None = None, sweeps: int = 1
    ) -> list[jax.Array]:
        """Vectors after sweeps of alternating least squares, float32.

        Args:
          vectors: to start from.
          w: what to approximate.
          where: entries that count.
          sweeps: how often each vector is refitted, by some steps of conjugate gradients on its normal equations.
        """
        unit = scaling.unit([w])
        w, found = unit.divide(w), [v.astype(jnp.float32) for v in vectors]
        found[0] = unit.divide(found[0])
        shown = 1.0 if where is None else where.astype(jnp.float32)

        def sweep(_: Any, found: list[jax.Array]) -> list[jax.Array]:
            for place in range(len(found)):
                found = [*found[:place], self._least_squares(found, place, w, shown), *found[place + 1 :]]
            return found

        found = jax.lax.fori_loop(0, sweeps, sweep, found) if w.size else found
        return [unit.saturated(found[0]), *found[1:]]

    def _least_squares(self, vectors: list[jax.Array], place: int, w: jax.Array, shown: Any) -> jax.Array:
        """The vector at ``place`` after steps of conjugate gradients towards the one that fits best."""

        def onto(v: jax.Array) -> jax.Array:
            return shown * self._dense_of([*vectors[:place], v, *vectors[place + 1 :]])

        old = vectors[place]
        transposed, wanted = jax.linear_transpose(onto, old), shown * w

        def step(i: Any, state: tuple) -> tuple:
            v, dense, direction, size = state
            along = onto(direction)
            # The first turn goes along the vector as it was, as far as is best: the products are compiled once.
            gain = jnp.where(i == 0, jnp.sum(along * wanted), size)
            length = _ratio(gain, jnp.sum(jnp.square(along)), jnp.where(i == 0, 1.0, 0.0))
            v, dense = v + length * direction, dense + length * along
            (slope,) = transposed(wanted - dense)
            new = jnp.sum(jnp.square(slope))
            return v, dense, slope + jnp.where(i == 0, 0.0, _ratio(new, size, 0.0)) * direction, new

        start = (jnp.zeros_like(old), jnp.zeros_like(w), old, jnp.float32(0))
        return jax.lax.fori_loop(0, _STEPS + 1, step, start)[0]

    def _dense_of(self, vectors: Sequence[jax.Array]) -> jax.Array:
        """The dense array of other vectors, of as many stacked layers as they have."""
        if vectors[0].ndim > 2:
            return jax.vmap(self._dense_of)(list(vectors))
        eye = jnp.eye(math.prod(self.sizes[:-1]), dtype=vectors[0].dtype)
        # Where rows are sharded over devices of a CPU, XLA may lay several out as its transforms do not take them.
        is_alone = jax.default_backend() != "cpu" or jax.device_count() == 1
        rows = _ROWS if is_alone else None
        return jax.lax.map(lambda row: self._through(row, vectors), eye, batch_size=rows).reshape(self.sizes)

    def multiply(self, x: jax.Array) -> jax.Array:
        """``x @ w`` for ``x`` (..., window and inputs): one step after the other."""
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        return self._through(x.astype(dtype), [core.dense(v).astype(dtype) for v in self.vectors])

    def _through(self, x: jax.Array, vectors: Sequence[jax.Array]) -> jax.Array:
        n, terms = vectors[0].shape
        if any(v.shape != (n, terms) for v in vectors) or n < max(x.shape[-1], self.sizes[-1]):
            raise ValueError(f"FastProduct: found vectors {[v.shape for v in vectors]} for an array of {self.sizes}")
        x = jnp.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, n - x.shape[-1])])
        found = [self._term(x, [v[:, t] for v in vectors])[..., : self.sizes[-1]] for t in range(terms)]
        return sum(found[1:], found[0])

    def _term(self, x: jax.Array, vectors: list[jax.Array]) -> jax.Array:
        left = list(vectors)
        if sum(step in _WITH_VECTOR for step in self.steps) != len(left):
            raise ValueError(f"FastProduct: found {len(left)} vectors for the steps {self.steps}")
        for place, step in enumerate(self.steps):
            if step in _WITH_VECTOR:
                x = _WITH_VECTOR[step](x, left.pop(0))
            elif step == "hadamard":
                x = fast_products.walsh(x)
            elif step == "permutation":
                x = x[..., jnp.argsort(hashing.hashes((self.seed + place) % 2**32, x.shape[-1:]), stable=True)]
            elif step in ("cosine", "back"):
                x = fast_products.cosine(x, inverse=step == "back")
            else:
                raise ValueError(f"FastProduct: found step {step!r}, which is none")
        return x


def _ratio(a: jax.Array, b: jax.Array, other: Any) -> jax.Array:
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), other)
