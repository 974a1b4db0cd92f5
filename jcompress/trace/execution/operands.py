"""The forms in which a leaf of a tree is multiplied: one weight, two factors, or a sum."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.formats import Arranged, LowRank, Masked, Quantized, Sum
from jcompress.formats.arranged import restored
from jcompress.trace.core import walk
from jcompress.trace.core.contraction import Dot, Product
from jcompress.trace.core.flow import Step
from jcompress.trace.core.layouts import Cast, Permutation
from jcompress.trace.core.views import View
from jcompress.trace.execution.blocks import Blocks
from jcompress.trace.execution.compact import Compact
from jcompress.trace.execution.fast import Fast, of_fast
from jcompress.trace.execution.grouped import Grouped, of_codes
from jcompress.trace.execution.networks import Network, of_factors, of_network
from jcompress.trace.execution.weights import Multiply, Range, Tell, Weight, static
from jcompress.trace.execution.words import Words


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factors:
    """``u v``: one product after the other.

    Attributes:
      u: a weight laid out as the value is, its axis ``out`` of the length of the rank.
      v: a weight (..., rank, outputs).
      out: a negative axis.
    """

    u: Weight
    v: Weight
    out: int = static(-1)

    def dense(self) -> jax.Array:
        """The array it stands for."""
        u = jnp.moveaxis(self.u.dense(), self.out, -1)
        dense = LowRank(u, self.v.dense()).materialize()
        return jnp.moveaxis(dense, -1, self.out)

    def _weight(self, note: str) -> Weight:
        """The dense array, and why it is one."""
        return Weight(self.dense(), ranges=self.u.ranges, dtype=self.u.dtype, path=self.u.path, note=note)

    def laid_out(self, step: Step) -> list[Factors] | None:
        """As for :class:`Weight`; what is not transposed is made dense."""
        if not isinstance(step.flow, (Cast, Permutation)) or not all(isinstance(k, View) for k in step.outs):
            return None
        if isinstance(step.flow, Cast):
            dtype = walk.aval(step.eqn.outvars[0]).dtype
            pair = (w.dense().astype(dtype) if w.scale is None else w.values for w in (self.u, self.v))
            u, v = (dataclasses.replace(w, values=x, dtype=dtype) for w, x in zip((self.u, self.v), pair, strict=True))
            return [Factors(u, v, out=self.out)]
        n = self.u.values.ndim
        out = step.flow.place(step.eqn, self.out % n)
        if self.v.values.ndim > 2 or out is None:
            return None
        return [Factors(u, self.v, out=out - n) for u in self.u.laid_out(step) or []] or None

    def stacked(self) -> Factors | Weight:
        """As for :class:`Weight`; where the rank takes the place of the layers, it is dense."""
        n, u = len(self.u.values), self.u
        if self.out == -u.values.ndim:
            return self._weight("LowRank whose outputs are the layers").stacked()
        if self.v.values.ndim > 2:
            return Factors(u.stacked(), self.v.stacked(), out=self.out)
        # One factor for all layers: each turn takes it as it is.
        shared = jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *x.shape)), self.v)
        return Factors(u.stacked(), shared, out=self.out)

    def product(self, product: Product, x: jax.Array, multiply: Multiply, tell: Tell) -> jax.Array:
        """The product with an activation."""
        u, v, out = self.u, self.v, self.out % self.u.values.ndim
        axis = product.outputs(out)
        if v.values.ndim > 2 or (axis is None and not isinstance(product, Dot)):
            return multiply(product, x, self._weight("LowRank with layers"))
        if axis is not None:
            y = multiply(product, x, u)
            second = product.with_matrix(y, axis, 0)
            return jnp.moveaxis(multiply(second, y, v), -1, axis)
        assert isinstance(product, Dot)
        if product.contracted != (out,) or product.numbers[1][0]:
            return multiply(product, x, self._weight("LowRank in two halves"))
        y = multiply(product.with_matrix(x, product.summed[0], 1), x, v)
        z = multiply(product.with_matrix(y, y.ndim - 1, out), y, u)
        return z if product.side else jnp.moveaxis(z, range(y.ndim - 1), range(-(y.ndim - 1), 0))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Terms:
    """A sum of weights: the sum of their products."""

    terms: tuple[Any, ...]

    def dense(self) -> jax.Array:
        """The array it stands for."""
        return sum((term.dense() for term in self.terms[1:]), self.terms[0].dense())

    def laid_out(self, step: Step) -> list[Terms] | None:
        """As for :class:`Weight`."""
        found = [term.laid_out(step) for term in self.terms]
        return None if any(x is None for x in found) else [Terms(column) for column in zip(*found, strict=True)]

    def stacked(self) -> Terms:
        """As for :class:`Weight`."""
        return Terms(tuple(term.stacked() for term in self.terms))

    def product(self, product: Product, x: jax.Array, multiply: Multiply, tell: Tell) -> jax.Array:
        """The product with an activation."""
        first, *rest = (term.product(product, x, multiply, tell) for term in self.terms)
        return sum(rest, first)


Operand = Weight | Factors | Terms | Network | Fast | Blocks | Compact | Words


def is_operand(x: Any) -> bool:
    """Whether a value is a weight in a form of its own."""
    return isinstance(x, (Weight, Factors, Terms, Network, Fast, Blocks, Compact, Words))


def dense(x: Any) -> Any:
    """The array that a value stands for."""
    return x.dense() if is_operand(x) else x


def of_leaf(path: str, leaf: Any, ranges: Mapping[tuple[int, ...], Range]) -> Operand:
    """A leaf of the tree in the form in which it is multiplied."""
    known: dict[str, Any] = {"ranges": dict(ranges), "path": path}
    if isinstance(leaf, Quantized) and (found := of_codes(leaf, **known)) is not None:
        return found
    if isinstance(leaf, Masked) and isinstance(leaf.values, Quantized):
        inner = of_leaf(path, leaf.values, ranges)
        if isinstance(inner, Grouped) and (masked := inner.masked(leaf.mask)) is not None:
            return masked
        if type(inner) is Weight and inner.scale is not None:
            hidden = jnp.zeros((), inner.values.dtype) if inner.zero is None else inner.zero.array
            return dataclasses.replace(inner, values=jnp.where(leaf.mask, inner.values, hidden))
    if isinstance(leaf, LowRank) and _is_thin(leaf):
        u, v = of_leaf(path, leaf.u, ranges), of_leaf(path, leaf.v, {})
        if isinstance(u, Weight) and isinstance(v, Weight):
            u, v = (dataclasses.replace(w, note=w.note or "a factor") for w in (u, v))
            return Factors(u, v)
    if (other := of_network(path, leaf) or of_fast(path, leaf)) is not None:
        return other
    if isinstance(leaf, Arranged) and isinstance(leaf.inner, LowRank) and _is_thin(leaf.inner):
        factors = _of_arranged(path, leaf, ranges)
        if factors is not None:
            return factors
    if isinstance(leaf, Arranged) and isinstance(leaf.inner, Sum):
        leaf = Sum(tuple(dataclasses.replace(leaf, inner=term).finalize() for term in leaf.inner.terms))
    if isinstance(leaf, Sum):
        thin = [t for t in leaf.terms if _is_low_rank(t)]
        rest = tuple(t for t in leaf.terms if not any(t is x for x in thin))
        if thin and len(rest) < 2:
            return Terms(tuple(of_leaf(path, t, ranges) for t in (*rest, *thin)))
    x = jnp.asarray(core.dense(leaf))
    note = f"{_named(leaf)} is made dense" if core.is_node(leaf) else ""
    return Weight(x, dtype=x.dtype, note=note, **known)


def _of_arranged(path: str, leaf: Arranged, ranges: Mapping[tuple[int, ...], Range]) -> Factors | Network | None:
    """Two factors, the first one laid out like the leaf, its outputs the rank; a network for several output axes."""
    layout, inner = leaf.layout, leaf.inner
    if layout.groups > 1 or layout.batch:
        return None
    if len(layout.outputs) > 1:
        return of_factors(path, leaf)
    (out,), sizes = layout.outputs, list(leaf.sizes)
    sizes[out] = inner.u.shape[-1]
    u = restored(inner.u, layout, tuple(sizes)) if core.is_node(inner.u) else layout.restore(inner.u, sizes)
    u, v = of_leaf(path, u, ranges), of_leaf(path, inner.v, {})
    if not isinstance(u, Weight) or not isinstance(v, Weight):
        return None
    u, v = (dataclasses.replace(w, note=w.note or "a factor") for w in (u, v))
    return Factors(u, v, out=out)


def _named(leaf: Any) -> str:
    return type(leaf.inner if isinstance(leaf, Arranged) else leaf).__name__


def _is_low_rank(term: Any) -> bool:
    term = term.inner if isinstance(term, Arranged) else term
    return isinstance(term, LowRank) and _is_thin(term)


def _is_thin(leaf: LowRank) -> bool:
    """Whether two products cost less than one."""
    u, v = (jax.eval_shape(core.dense, x) for x in (leaf.u, leaf.v))
    return u.size + v.size < u.size // u.shape[-1] * v.shape[-1]
