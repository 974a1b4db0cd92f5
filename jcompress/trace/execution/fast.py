"""Circulant matrices and products of fast transforms inside a function: the activation goes through the steps."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Layout
from jcompress.formats import Arranged, FastProduct, Gathered
from jcompress.trace.core import walk
from jcompress.trace.core.contraction import Dot, Product
from jcompress.trace.core.flow import Step
from jcompress.trace.core.layouts import Cast, Permutation
from jcompress.trace.core.views import View
from jcompress.trace.execution import rows
from jcompress.trace.execution.weights import Multiply, Tell, Weight, static

WORTH = 0.1
"""Steps are taken where they are this part of the dense multiply-adds, or less: they move more for each."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fast:
    """A node that multiplies activations in fewer steps, laid out as the value is.

    Attributes:
      node: of (inputs, outputs), its fields dense.
      layout: what the axes of the value are.
      sizes: their lengths.
      path: the parameter.
      dtype: of what it stands for.
    """

    node: Any
    layout: Layout = static()
    sizes: tuple[int, ...] = static()
    path: str = static("")
    dtype: Any = static(None)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the value."""
        return self.sizes

    def dense(self) -> jax.Array:
        """The array it stands for."""
        return self.layout.restore(self.node.materialize(), self.sizes).astype(self.dtype)

    def laid_out(self, step: Step) -> list[Fast] | None:
        """As for :class:`Weight`; what is not transposed is made dense."""
        if not isinstance(step.flow, (Cast, Permutation)) or not all(isinstance(k, View) for k in step.outs):
            return None
        if isinstance(step.flow, Cast):
            return [dataclasses.replace(self, dtype=walk.aval(step.eqn.outvars[0]).dtype)]
        n = len(self.sizes)
        places = [step.flow.place(step.eqn, axis) for axis in range(n)]
        if None in places:
            return None
        named: dict[str, Any] = {
            name: tuple(places[a + n] - n for a in getattr(self.layout, name)) for name in ("inputs", "outputs")
        }
        sizes = tuple(self.sizes[places.index(i)] for i in range(n))
        return [dataclasses.replace(self, layout=Layout(**named), sizes=sizes)]

    def stacked(self) -> Weight:
        """As for :class:`Weight`: made dense, as the sizes are those of one layer."""
        return self._weight().stacked()

    def _weight(self) -> Weight:
        note = f"{type(self.node).__name__} is made dense"
        return Weight(self.dense(), dtype=self.dtype, path=self.path, note=note)

    def product(self, product: Product, x: jax.Array, multiply: Multiply, tell: Tell) -> jax.Array:
        """The product with an activation, step by step or with the dense array."""
        share, n = cost(self.node) / max(math.prod(self.sizes), 1), len(self.sizes)
        if isinstance(product, Dot) and not product.numbers[1][0] and share <= WORTH:
            for mine, theirs in ((self.layout.inputs, self.layout.outputs), (self.layout.outputs, self.layout.inputs)):
                if sorted(product.contracted) == sorted(a + n for a in mine):
                    tell(self.sizes, f"fast transforms, {share:.1%} of the dense products")
                    return self._dot(product, x, mine, theirs)
        return multiply(product, x, self._weight())

    def _dot(self, product: Dot, x: jax.Array, mine: tuple[int, ...], theirs: tuple[int, ...]) -> jax.Array:
        """Contracted over the axes ``mine`` of the value, which are its inputs or its outputs."""
        flat, restored = rows.flattened(product, x, self.sizes, mine, theirs)
        return restored(self.node.multiply(flat) if mine == self.layout.inputs else self._back(flat))

    def _back(self, x: jax.Array) -> jax.Array:
        """``x @ w.T``."""
        wide = jnp.promote_types(x.dtype, jnp.float32)
        like = jax.ShapeDtypeStruct((*x.shape[:-1], self.node.sizes[-2]), wide)
        return jax.linear_transpose(self.node.multiply, like)(x.astype(wide))[0]


def cost(node: Gathered | FastProduct) -> float:
    """About how many multiply-adds a row takes."""
    if isinstance(node, Gathered):
        (rows, columns), block = node.blocks, node.slots[0]
        return (rows + columns) * _transform(block) + 2 * rows * columns * block
    n, terms = node.vectors[0].shape
    each = {"diagonal": n, "permutation": n, "circulant": 2 * _transform(n), "skew": 4 * _transform(n)}
    each |= {"hadamard": 4 * n * math.log2(max(n, 2)), "cosine": 2 * _transform(n), "back": 2 * _transform(n)}
    return terms * sum(each[step] for step in node.steps)


def _transform(n: int) -> float:
    """Of a real Fourier transform."""
    return 1.25 * n * math.log2(max(n, 2))


def of_fast(path: str, leaf: Any) -> Fast | None:
    """The operand of a circulant matrix or of a fast product, arranged or not; None for another node."""
    inner, layout = (leaf.inner, leaf.layout) if isinstance(leaf, Arranged) else (leaf, Layout())
    if not isinstance(inner, (Gathered, FastProduct)) or len(inner.sizes) != 2:
        return None
    if isinstance(inner, Gathered) and inner.rule != "circulant":
        return None
    if layout.batch or layout.window or layout.groups > 1:
        return None
    sizes = leaf.sizes if isinstance(leaf, Arranged) else inner.sizes
    dtype = leaf.dtype
    if isinstance(inner, Gathered):
        inner = dataclasses.replace(inner, values=core.dense(inner.values))
        stacked = inner.values.ndim > 1
    else:
        inner = dataclasses.replace(inner, vectors=tuple(core.dense(v) for v in inner.vectors))
        stacked = inner.vectors[0].ndim > 2
    return None if stacked else Fast(inner, layout=layout, sizes=tuple(sizes), path=path, dtype=dtype)
