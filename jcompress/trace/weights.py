"""Compressed parameters inside a function: laid out anew and sliced like the arrays they stand for."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.extend import core as jax_core

from jcompress import core
from jcompress.formats import LowRank, Masked, Quantized, Sum
from jcompress.trace import contraction, walk
from jcompress.trace.contraction import Dot, Product
from jcompress.trace.products import outputs_of
from jcompress.trace.views import Joined, Kind, View


def _static(default: Any = dataclasses.MISSING) -> Any:
    return dataclasses.field(default=default, metadata={"static": True}, kw_only=True)


class Policy(Protocol):
    """How one product of an activation and a weight is computed."""

    def multiply(self, product: Product, x: jax.Array, w: Weight, axes: tuple[int, ...]) -> tuple[jax.Array, str]:
        """The product, and how it was made; ``axes`` of the parameter are summed, negative."""
        ...


Multiply = Any
"""``multiply(product, x, weight)``: the policy's product, with a note of how it was made."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shared:
    """An array that broadcasts to the shape of a weight: of size 1 along the ``constant`` axes of the parameter."""

    array: Any
    constant: frozenset[int] = _static()

    def laid_out(self, eqn: jax_core.JaxprEqn, shape: Sequence[int], kinds: Sequence[Kind]) -> list[Shared]:
        """After a change of layout of the weight, which had this shape."""
        found = walk.bind(eqn, [jnp.broadcast_to(self.array, shape)])
        return [Shared(_narrow(x, k, self.constant), constant=self.constant) for x, k in zip(found, kinds, strict=True)]

    def stacked(self, n: int) -> Shared:
        """With all of the leading axis."""
        return dataclasses.replace(self, array=jnp.broadcast_to(self.array, (n, *self.array.shape[1:])))


Range = tuple[Shared, Shared]
"""The lowest and the highest value of an activation."""


def _narrow(x: jax.Array, kind: Kind, constant: frozenset[int]) -> jax.Array:
    """One position along the axes of a value that run over nothing but constant axes of the parameter."""
    parts = kind.parts if isinstance(kind, Joined) else (kind,)
    for d in range(x.ndim):
        atoms = [a for part in parts if isinstance(part, View) for a in part.dims[d]]
        is_joint = isinstance(kind, Joined) and d == kind.dim
        if not is_joint and all(a.axis in constant or a.axis < 0 for a in atoms):
            x = jax.lax.slice_in_dim(x, 0, min(1, x.shape[d]), axis=d)
    return x


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weight:
    """``scale * (values - zero)``, or ``values`` alone, laid out as the value it stands for.

    Attributes:
      values: codes, levels, or the dense array.
      scale: broadcasts against ``values``, or None.
      zero: the same for zero points.
      ranges: for each set of contracted axes (negative), the lowest and highest value of the activation that meets
        them; those under ``()`` are for any.
      dtype: of what it stands for.
      bits: of integer codes; None where ``values`` are no integers.
      path: the parameter.
      note: why it is dense, where something else was given.
    """

    values: Any
    scale: Shared | None = None
    zero: Shared | None = None
    ranges: dict[tuple[int, ...], Range] = dataclasses.field(default_factory=dict)
    dtype: Any = _static()
    bits: int | None = _static(None)
    path: str = _static("")
    note: str = _static("")

    def dense(self) -> jax.Array:
        """The array it stands for."""
        if self.scale is None:
            return self.values.astype(self.dtype)
        return (self.scale.array * self.levels(self.scale.array.dtype)).astype(self.dtype)

    def levels(self, dtype: Any) -> jax.Array:
        """What the scale multiplies."""
        values = self.values.astype(dtype)
        return values if self.zero is None else values - self.zero.array.astype(dtype)

    def has_scale_of_outputs(self, product: Product) -> bool:
        """Whether there is a scale, and it is shared by all that the product sums."""
        return self.scale is not None and all(self.scale.array.shape[d] == 1 for d in product.contracted)

    def laid_out(self, eqn: jax_core.JaxprEqn, kinds: Sequence[Kind]) -> list[Weight] | None:
        """The results of an equation that only lays the weight out anew, or None if there is no short form of them."""
        if not all(isinstance(k, (View, Joined)) for k in kinds):
            return None
        if eqn.primitive.name == "convert_element_type":
            dtype = walk.aval(eqn.outvars[0]).dtype
            values = self.values.astype(dtype) if self.scale is None else self.values
            return [dataclasses.replace(self, values=values, dtype=dtype)]
        shape, values = self.values.shape, walk.bind(eqn, [self.values])
        known = jax.tree.map(lambda x: x.laid_out(eqn, shape, kinds), self.known(), is_leaf=_is_shared)
        return [
            dataclasses.replace(self, values=x, **jax.tree.map(lambda xs, i=i: xs[i], known, is_leaf=_is_list))
            for i, x in enumerate(values)
        ]

    def known(self) -> dict[str, Any]:
        """All that broadcasts against the values."""
        return {"scale": self.scale, "zero": self.zero, "ranges": self.ranges}

    def stacked(self) -> Weight:
        """In a form of which every array has the leading axis, to be sliced by a loop."""
        n = len(self.values)
        known = jax.tree.map(lambda x: x.stacked(n), self.known(), is_leaf=_is_shared)
        return dataclasses.replace(self, **known)

    def product(self, product: Product, x: jax.Array, multiply: Multiply) -> jax.Array:
        """The product with an activation."""
        return multiply(product, x, self)


def side_by_side(weights: Sequence[Any], eqn: jax_core.JaxprEqn, kind: Kind) -> Weight | None:
    """Codes of several parameters as those of one, as where gates are multiplied in one product; or None."""
    if not isinstance(kind, Joined) or not all(isinstance(w, Weight) and w.scale is not None for w in weights):
        return None
    if len({(w.values.dtype, w.zero is None, w.dtype, w.bits is None) for w in weights}) > 1:
        return None
    dim = eqn.params["dimension"]

    def joined(parts: Sequence[Shared]) -> Shared | None:
        shapes = [tuple(1 if d == dim else n for d, n in enumerate(p.array.shape)) for p in parts]
        if len(set(shapes)) > 1:
            return None
        lengths = [w.values.shape[dim] for w in weights]
        arrays = [
            jnp.broadcast_to(p.array, (*p.array.shape[:dim], n, *p.array.shape[dim + 1 :]))
            for p, n in zip(parts, lengths, strict=True)
        ]
        constant = frozenset.intersection(*(p.constant for p in parts))
        return Shared(jnp.concatenate(arrays, axis=dim), constant=constant)

    first, values = weights[0], jnp.concatenate([w.values for w in weights], axis=dim)
    scale = joined([w.scale for w in weights])
    zero = None if first.zero is None else joined([w.zero for w in weights])
    ranges = {
        axes: (
            _most(jnp.minimum, [w.ranges[axes][0] for w in weights]),
            _most(jnp.maximum, [w.ranges[axes][1] for w in weights]),
        )
        for axes in first.ranges
        if all(axes in w.ranges and w.ranges[axes][0].array.shape[dim] == 1 for w in weights)
    }
    bits = None if first.bits is None else max(w.bits for w in weights)
    known = {"scale": scale, "zero": zero, "ranges": ranges}
    return None if scale is None else dataclasses.replace(first, values=values, bits=bits, **known)


def _most(combine: Any, ends: Sequence[Shared]) -> Shared:
    return dataclasses.replace(ends[0], array=functools.reduce(combine, [end.array for end in ends]))


def _is_shared(x: Any) -> bool:
    return isinstance(x, Shared)


def _is_list(x: Any) -> bool:
    return isinstance(x, list)


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
    out: int = _static(-1)

    def dense(self) -> jax.Array:
        """The array it stands for."""
        u = jnp.moveaxis(self.u.dense(), self.out, -1)
        dense = LowRank(u, self.v.dense()).materialize()
        return jnp.moveaxis(dense, -1, self.out)

    def laid_out(self, eqn: jax_core.JaxprEqn, kinds: Sequence[Kind]) -> list[Factors] | None:
        """As for :class:`Weight`; what is not transposed is made dense."""
        name = eqn.primitive.name
        if name not in ("transpose", "convert_element_type") or not all(isinstance(k, View) for k in kinds):
            return None
        if name == "convert_element_type":
            dtype = walk.aval(eqn.outvars[0]).dtype
            pair = (w.dense().astype(dtype) if w.scale is None else w.values for w in (self.u, self.v))
            u, v = (dataclasses.replace(w, values=x, dtype=dtype) for w, x in zip((self.u, self.v), pair, strict=True))
            return [Factors(u, v, out=self.out)]
        order, n = eqn.params["permutation"], self.u.values.ndim
        if self.v.values.ndim > 2:
            return None
        found = self.u.laid_out(eqn, kinds) or []
        return [Factors(u, self.v, out=order.index(self.out % n) - n) for u in found] or None

    def stacked(self) -> Factors:
        """As for :class:`Weight`."""
        return Factors(self.u.stacked(), self.v.stacked(), out=self.out)

    def product(self, product: Product, x: jax.Array, multiply: Multiply) -> jax.Array:
        """The product with an activation."""
        u, v, out = self.u, self.v, self.out % self.u.values.ndim
        axis = outputs_of(product.eqn, getattr(product, "side", 1), out)
        if v.values.ndim > 2 or (axis is None and not isinstance(product, Dot)):
            dense = dataclasses.replace(u, values=self.dense(), scale=None, zero=None, note="LowRank with layers")
            return multiply(product, x, dense)
        if axis is not None:
            y = multiply(product, x, u)
            second = contraction.pair(product.eqn, y, axis, 0)
            return jnp.moveaxis(multiply(second, y, v), -1, axis)
        assert isinstance(product, Dot)
        if product.contracted != (out,) or product.numbers[1][0]:
            dense = dataclasses.replace(u, values=self.dense(), scale=None, zero=None, note="LowRank in two halves")
            return multiply(product, x, dense)
        y = multiply(contraction.pair(product.eqn, x, product.summed[0], 1), x, v)
        z = multiply(contraction.pair(product.eqn, y, y.ndim - 1, out), y, u)
        return z if product.side else jnp.moveaxis(z, range(y.ndim - 1), range(-(y.ndim - 1), 0))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Terms:
    """A sum of weights: the sum of their products."""

    terms: tuple[Any, ...]

    def dense(self) -> jax.Array:
        """The array it stands for."""
        return sum((term.dense() for term in self.terms[1:]), self.terms[0].dense())

    def laid_out(self, eqn: jax_core.JaxprEqn, kinds: Sequence[Kind]) -> list[Terms] | None:
        """As for :class:`Weight`."""
        found = [term.laid_out(eqn, kinds) for term in self.terms]
        return None if any(x is None for x in found) else [Terms(column) for column in zip(*found, strict=True)]

    def stacked(self) -> Terms:
        """As for :class:`Weight`."""
        return Terms(tuple(term.stacked() for term in self.terms))

    def product(self, product: Product, x: jax.Array, multiply: Multiply) -> jax.Array:
        """The product with an activation."""
        first, *rest = (term.product(product, x, multiply) for term in self.terms)
        return sum(rest, first)


Operand = Weight | Factors | Terms


def is_operand(x: Any) -> bool:
    """Whether a value is a weight in a form of its own."""
    return isinstance(x, (Weight, Factors, Terms))


def dense(x: Any) -> Any:
    """The array that a value stands for."""
    return x.dense() if is_operand(x) else x


def of_leaf(path: str, leaf: Any, ranges: Mapping[tuple[int, ...], Range]) -> Operand:
    """A leaf of the tree in the form in which it is multiplied."""
    known: dict[str, Any] = {"ranges": dict(ranges), "path": path}
    if isinstance(leaf, Quantized) and leaf.group_size is None and not core.is_node(leaf.codes):
        return _of_codes(leaf, known)
    if isinstance(leaf, Masked) and isinstance(leaf.values, Quantized):
        inner = of_leaf(path, leaf.values, ranges)
        if isinstance(inner, Weight) and inner.scale is not None:
            hidden = jnp.zeros((), inner.values.dtype) if inner.zero is None else inner.zero.array
            return dataclasses.replace(inner, values=jnp.where(leaf.mask, inner.values, hidden))
    if isinstance(leaf, LowRank) and _is_thin(leaf):
        u, v = of_leaf(path, leaf.u, ranges), of_leaf(path, leaf.v, {})
        if isinstance(u, Weight) and isinstance(v, Weight):
            u, v = (dataclasses.replace(w, note=w.note or "a factor") for w in (u, v))
            return Factors(u, v)
    if isinstance(leaf, Sum):
        thin = [t for t in leaf.terms if isinstance(t, LowRank) and _is_thin(t)]
        rest = tuple(t for t in leaf.terms if not any(t is x for x in thin))
        if thin and len(rest) < 2:
            return Terms(tuple(of_leaf(path, t, ranges) for t in (*rest, *thin)))
    x = core.dense(leaf)
    note = f"{_named(leaf)} is made dense" if core.is_node(leaf) else ""
    return Weight(x, dtype=x.dtype, note=note, **known)


def _named(leaf: Any) -> str:
    is_grouped = isinstance(leaf, Quantized) and leaf.group_size is not None
    return type(leaf).__name__ + (" with groups along the contraction" if is_grouped else "")


def _of_codes(leaf: Quantized, known: dict[str, Any]) -> Weight:
    scale = core.dense(leaf.scale)
    scale = scale if jnp.dtype(scale.dtype).itemsize > 1 else scale.astype(jnp.float32)
    constant = frozenset(d for d, n in enumerate(scale.shape) if n == 1)
    codes: Any = leaf.codes
    bits = leaf.bits if leaf.table is None and jnp.issubdtype(codes.dtype, jnp.integer) else None
    if leaf.table is not None:
        codes = leaf.levels(jnp.float32)
    elif leaf.bits == 1 and leaf.zero is None:
        codes = 2 * codes + 1
    zero = None if leaf.zero is None else Shared(leaf.zero, constant=constant)
    return Weight(codes, Shared(scale, constant=constant), zero, dtype=leaf.dtype, bits=bits, **known)


def _is_thin(leaf: LowRank) -> bool:
    """Whether two products cost less than one."""
    u, v = (jax.eval_shape(core.dense, x) for x in (leaf.u, leaf.v))
    return u.size + v.size < u.size // u.shape[-1] * v.shape[-1]
