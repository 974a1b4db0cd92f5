"""Compressed parameters inside a function: laid out anew and sliced like the arrays they stand for."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.extend import core as jax_core

from jcompress.trace.core import walk
from jcompress.trace.core.contraction import Product
from jcompress.trace.core.flow import Step
from jcompress.trace.core.layouts import Cast
from jcompress.trace.core.views import Joined, Kind, View
from jcompress.trace.execution.rows import Lookup


def static(default: Any = dataclasses.MISSING) -> Any:
    """A field that is no array."""
    return dataclasses.field(default=default, metadata={"static": True}, kw_only=True)


class Policy(Protocol):
    """How one product of an activation and a weight is computed: all that :class:`Executed` asks for.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> class Half:
      ...     def multiply(self, product, x, w, axes):
      ...         return product.apply(x, w.dense() / 2), "halved"
      >>> halved = jc.trace.Executed(lambda params, x: x @ params["w"], Half())
      >>> halved({"w": jnp.ones((2, 2))}, jnp.ones((1, 2))).tolist()
      [[1.0, 1.0]]
    """

    def multiply(self, product: Product, x: jax.Array, w: Weight, axes: tuple[int, ...]) -> tuple[jax.Array, str]:
        """Compute one product.

        Args:
          product: which axes are summed, and how it is applied.
          x: the activation.
          w: the weight, laid out as the product takes it.
          axes: those of the parameter that are summed, negative; none where they cannot be told.

        Returns:
          The product, and how it was made, for the report.
        """
        ...


Multiply = Any
"""``multiply(product, x, weight)``: the policy's product, with a note of how it was made."""
Tell = Any
"""``tell(shape, how)``: a row of the report, for a product that is not the policy's."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shared:
    """An array that broadcasts to the shape of a weight: of size 1 along the ``constant`` axes of the parameter."""

    array: Any
    constant: frozenset[int] = static()

    def laid_out(self, eqn: jax_core.JaxprEqn, shape: Sequence[int], kinds: Sequence[Kind]) -> list[Shared]:
        """After a change of layout of the weight, which had this shape."""
        found = walk.bind(eqn, [jnp.broadcast_to(self.array, shape)])
        return [Shared(_narrow(x, k, self.constant), constant=self.constant) for x, k in zip(found, kinds, strict=True)]

    def stacked(self, n: int) -> Shared:
        """With all of the leading axis."""
        return dataclasses.replace(self, array=jnp.broadcast_to(self.array, (n, *self.array.shape[1:])))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Range:
    """The lowest and the highest value of an activation that meets a parameter.

    Attributes:
      low: the lowest; in the rank of the parameter, of size 1 but along stacked layers that have ranges of their own.
      high: the highest, alike.

    Example:
      >>> import jcompress as jc
      >>> jc.trace.Range.of(-1.0, 2.0, (3, 4)).high.array.shape
      (1, 1)
    """

    low: Shared
    high: Shared

    @classmethod
    def of(cls, low: Any, high: Any, shape: Sequence[int]) -> Range:
        """The range for a parameter of this shape.

        Args:
          low: scalar, or (layers...,) for parameters that are stacked along their first axes.
          high: alike.
          shape: of the parameter.

        Returns:
          The range.
        """

        def end(x: Any) -> Shared:
            x = jnp.asarray(x, jnp.float32)
            constant = frozenset(range(x.ndim, len(shape)))
            return Shared(x.reshape(*x.shape, *[1] * (len(shape) - x.ndim)), constant=constant)

        return cls(end(low), end(high))

    def of_activation(self, product: Product, ndim: int) -> tuple[jax.Array, jax.Array]:
        """Both ends in the rank of the activation, the widest of what one scale must hold for."""
        return -product.shared(-self.low.array, ndim), product.shared(self.high.array, ndim)


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
      packed: the codes as :class:`~jcompress.formats.Bits`, where they lie so in memory.
      dtype: of what it stands for.
      bits: of integer codes; None where ``values`` are no integers.
      path: the parameter.
      note: why it is dense, where something else was given.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> w = jc.trace.Weight(jnp.array([[1.0, -1.0]]), dtype=jnp.float32, path="w")
      >>> w.coded(jnp.array([[4, -4]], jnp.int8), jnp.array([[0.25, 0.25]]), bits=4).dense().tolist()
      [[1.0, -1.0]]
    """

    values: Any
    scale: Shared | None = None
    zero: Shared | None = None
    ranges: dict[tuple[int, ...], Range] = dataclasses.field(default_factory=dict)
    packed: Any = None
    dtype: Any = static()
    bits: int | None = static(None)
    path: str = static("")
    note: str = static("")

    def dense(self) -> jax.Array:
        """The array it stands for."""
        if self.scale is None:
            return self.values.astype(self.dtype)
        return (self.scale.array * self.levels(self.scale.array.dtype)).astype(self.dtype)

    def levels(self, dtype: Any) -> jax.Array:
        """What the scale multiplies."""
        values = self.values.astype(dtype)
        return values if self.zero is None else values - self.zero.array.astype(dtype)

    def coded(self, codes: jax.Array, scale: jax.Array, bits: int) -> Weight:
        """The weight with codes made for it: ``scale`` times ``codes``, of the same rank."""
        shared = Shared(scale, constant=frozenset())
        return dataclasses.replace(self, values=codes, scale=shared, bits=bits, packed=None)

    def range_of(self, axes: tuple[int, ...]) -> Range | None:
        """What is known of an activation that is summed with these axes of the parameter."""
        return self.ranges.get(axes, self.ranges.get(()))

    def has_scale_of_outputs(self, product: Product) -> bool:
        """Whether there is a scale, and it is shared by all that the product sums."""
        return self.scale is not None and all(self.scale.array.shape[d] == 1 for d in product.contracted)

    def laid_out(self, step: Step) -> list[Weight] | None:
        """The results of an equation that only lays the weight out anew, or None if there is no short form of them."""
        eqn, kinds = step.eqn, step.outs
        if not all(isinstance(k, (View, Joined)) for k in kinds):
            return None
        if isinstance(step.flow, Cast):
            dtype = walk.aval(eqn.outvars[0]).dtype
            values = self.values.astype(dtype) if self.scale is None else self.values
            return [dataclasses.replace(self, values=values, dtype=dtype)]
        shape, values = self.values.shape, walk.bind(eqn, [self.values])
        known = jax.tree.map(lambda x: x.laid_out(eqn, shape, kinds), self.known(), is_leaf=_is_shared)
        return [
            dataclasses.replace(
                self, values=x, packed=None, **jax.tree.map(lambda xs, i=i: xs[i], known, is_leaf=_is_list)
            )
            for i, x in enumerate(values)
        ]

    def known(self) -> dict[str, Any]:
        """All that broadcasts against the values."""
        return {"scale": self.scale, "zero": self.zero, "ranges": self.ranges}

    def stacked(self) -> Weight:
        """In a form of which every array has the leading axis, to be sliced by a loop."""
        n = len(self.values)
        known = jax.tree.map(lambda x: x.stacked(n), self.known(), is_leaf=_is_shared)
        return dataclasses.replace(self, packed=None, **known)

    def product(self, product: Product, x: jax.Array, multiply: Multiply, tell: Tell) -> jax.Array:
        """The product with an activation."""
        return multiply(product, x, self)

    def looked_up(self, lookup: Lookup, values: jax.Array | None = None) -> jax.Array:
        """Rows of it, of which nothing else is made dense.

        Args:
          lookup: which.
          values: those rows of the values, where they were found otherwise.
        """
        values = lookup.taken(self.values) if values is None else values
        known: dict[str, Any] = {
            name: x and dataclasses.replace(x, array=lookup.taken(x.array))
            for name, x in (("scale", self.scale), ("zero", self.zero))
        }
        return lookup.restored(dataclasses.replace(self, values=values, **known).dense())

    def told(self, how: str, product: Product) -> str:
        """How a product was made, and why it was not made with codes."""
        varies = self.scale is not None and not self.has_scale_of_outputs(product)
        note = "its scales vary along the contraction" if varies else self.note
        return f"{how}: {note}" if note else how


def side_by_side(weights: Sequence[Any], step: Step) -> Weight | None:
    """Codes of several parameters as those of one, as where gates are multiplied in one product; or None."""
    kind = step.outs[0]
    if not isinstance(kind, Joined) or not all(type(w) is Weight and w.scale is not None for w in weights):
        return None
    if len({(w.values.dtype, w.zero is None, w.dtype, w.bits is None) for w in weights}) > 1:
        return None
    dim = kind.dim

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
        axes: Range(
            _most(jnp.minimum, [w.ranges[axes].low for w in weights]),
            _most(jnp.maximum, [w.ranges[axes].high for w in weights]),
        )
        for axes in first.ranges
        if all(axes in w.ranges and w.ranges[axes].low.array.shape[dim] == 1 for w in weights)
    }
    bits = None if first.bits is None else max(w.bits for w in weights)
    known = {"scale": scale, "zero": zero, "ranges": ranges, "packed": None}
    return None if scale is None else dataclasses.replace(first, values=values, bits=bits, **known)


def _most(combine: Any, ends: Sequence[Shared]) -> Shared:
    return dataclasses.replace(ends[0], array=functools.reduce(combine, [end.array for end in ends]))


def _is_shared(x: Any) -> bool:
    return isinstance(x, Shared)


def _is_list(x: Any) -> bool:
    return isinstance(x, list)
