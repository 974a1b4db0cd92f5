"""Codes whose scales change along what is summed: multiplied block by block, no more of the weight ever being dense."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.formats import Quantized
from jcompress.formats.quantized import spread
from jcompress.numeric import meshes
from jcompress.trace.core import walk
from jcompress.trace.core.contraction import Dot, Product
from jcompress.trace.core.flow import Step
from jcompress.trace.core.layouts import Cast, Permutation
from jcompress.trace.core.views import View
from jcompress.trace.execution.rows import Lookup
from jcompress.trace.execution.weights import Shared, Weight, static

ROWS = 128
"""An activation of more rows reuses the dense weight often enough to pay for it."""
BLOCK = 2**18
"""Entries that are dense at a time: what a cache holds. Of small weights a quarter, of large ones a 64th."""
SMALL = 2**14
"""Fewer entries are dense at once."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Grouped(Weight):
    """Codes with a scale for each group of entries, or for each block.

    Attributes:
      form: the node, without its arrays: ``values`` are its codes, ``scale`` and ``zero`` those of groups.
    """

    form: Quantized = static()

    @classmethod
    def of(cls, leaf: Quantized, **known: Any) -> Grouped:
        """The operand of a node with groups."""
        zero = None if leaf.zero is None else Shared(leaf.zero, constant=frozenset())
        form = dataclasses.replace(leaf, codes=None, scale=None, zero=None)
        scale = Shared(leaf.scales(), constant=frozenset())
        shared = "a scale for each block" if isinstance(leaf.group_size, tuple) else "groups along the contraction"
        whole = jnp.issubdtype(leaf.codes.dtype, jnp.integer) and leaf.table is None and leaf.bits > 1
        bits = leaf.bits if whole else None
        return cls(leaf.codes, scale, zero, dtype=leaf.dtype, form=form, note=shared, bits=bits, **known)

    @property
    def node(self) -> Quantized:
        """The node in the layout of the value."""
        assert self.scale is not None
        zero = None if self.zero is None else self.zero.array
        return dataclasses.replace(
            self.form, codes=self.values, scale=self.scale.array, zero=zero, dtype=jnp.dtype(self.dtype)
        )

    def dense(self) -> jax.Array:
        """The array it stands for."""
        return self.node.materialize()

    def masked(self, mask: jax.Array) -> Grouped | None:
        """With codes of zero where a mask is False; None where no code is sure to be zero."""
        node = self.node
        if node.table is not None or node.bits == 1:
            return None
        hidden = 0 if node.zero is None else spread(node.zero, node.codes, node.group_size, node.group_axis)
        return dataclasses.replace(self, values=jnp.where(mask, node.codes, jnp.asarray(hidden, node.codes.dtype)))

    def has_scale_of_outputs(self, product: Product) -> bool:
        """No: scales change along the groups."""
        return False

    def laid_out(self, step: Step) -> list[Weight] | None:
        """As for :class:`Weight`; what is not transposed is made dense."""
        if not isinstance(step.flow, (Cast, Permutation)) or not all(isinstance(k, View) for k in step.outs):
            return None
        if isinstance(step.flow, Cast):
            return [dataclasses.replace(self, dtype=walk.aval(step.eqn.outvars[0]).dtype)]
        n = self.values.ndim
        places = [step.flow.place(step.eqn, axis) for axis in range(n)]
        if sorted(p for p in places if p is not None) != list(range(n)):
            return None
        order = [places.index(d) for d in range(n)]
        turned = tuple(order.index(axis % n) - n for axis in self._axes())
        form = dataclasses.replace(self.form, group_axis=turned if len(turned) > 1 else turned[0])
        known = {name: getattr(self, name) for name in ("scale", "zero")}
        known = {k: x and dataclasses.replace(x, array=x.array.transpose(order)) for k, x in known.items()}
        values = self.values.transpose(order)
        return [dataclasses.replace(self, values=values, form=form, packed=None, **known)]

    def told(self, how: str, product: Product) -> str:
        """How a product was made, and why it was not made with codes."""
        return f"{how}: {self.note}" if self.note else how

    def looked_up(self, lookup: Lookup, values: jax.Array | None = None) -> jax.Array:
        """As for :class:`Weight`."""
        node, along = self.node, self._axes()
        unit = 1 if along == (-1,) else self._group(0)
        if along == (-1,) or len(along) == 1:
            size = node.group_size if along == (-1,) else None
            known: dict[str, Any] = {
                name: x if x is None else lookup.taken(x, unit)
                for name, x in (("scale", node.scale), ("zero", node.zero))
            }
            values = lookup.taken(node.codes) if values is None else values
            return lookup.restored(dataclasses.replace(node, codes=values, group_size=size, **known).materialize())
        return lookup.restored(lookup.taken(self.dense()))

    def group_of(self, axis: int) -> int | None:
        """How many codes along an axis share a scale, where that is all that says which; else None."""
        is_one = isinstance(self.form.group_size, int) and self._axes() == (axis - self.values.ndim,)
        return self.form.group_size if is_one and self.bits is not None else None  # type: ignore[return-value]

    def by_blocks(self, product: Product, x: jax.Array) -> tuple[jax.Array, str]:
        """The product, one block of the weight after the other made dense, multiplied and added up."""
        reason = self._obstacle(product, x)
        if reason:
            return product.apply(x, self.dense()), f"dense: {self.note}, {reason}"
        axis, rows = self._block(product)
        size = self.values.shape[axis]
        y = added_up(product, x, axis, size, rows, lambda start, count: self._rows(axis, start, count).materialize())
        return y, f"codes in groups, {rows} of {size} rows made dense at a time"

    def _obstacle(self, product: Product, x: jax.Array) -> str:
        """Why the product is not made block by block, if it is not."""
        if not isinstance(product, Dot):
            return "in a convolution"
        rows = x.size // max(math.prod(x.shape[d] for d in product.summed), 1)
        if rows > ROWS:
            return f"for {rows} rows"
        axis, count = self._block(product)
        if self.values.size < SMALL or count >= self.values.shape[axis]:
            return "for a small weight"
        is_split = meshes.is_explicit(self.values) and meshes.spec_of(self.values)[axis] is not None
        return "sharded along the contraction" if is_split else ""

    def _block(self, product: Product) -> tuple[int, int]:
        """The longest axis that is summed over, and how many of its positions make a block: whole groups."""
        shape = self.values.shape
        axis = max(product.contracted, key=lambda d: shape[d])
        return axis, at_a_time(shape, axis, self._group(axis))

    def _axes(self) -> tuple[int, ...]:
        """The axes that groups lie along, negative."""
        along = self.form.group_axis
        if isinstance(along, tuple):
            return along
        return (along,) if isinstance(self.form.group_size, int) else (along, -1)

    def _group(self, axis: int) -> int:
        """How many positions along an axis share a scale, at least."""
        size = self.form.group_size
        sizes = size if isinstance(size, tuple) else (size or 1,)
        return dict(zip(self._axes(), sizes, strict=True)).get(axis - self.values.ndim, 1)

    def _rows(self, axis: int, start: Any, count: int) -> Quantized:
        """The node of some positions along an axis, from the first of a group."""
        size = self.values.shape[axis]

        def taken(array: Any) -> Any:
            if array is None or array.shape[axis] == 1:
                return array
            unit = 1 if array.shape[axis] == size else self._group(axis)
            return jax.lax.dynamic_slice_in_dim(array, start // unit, -(-count // unit), axis=axis)

        node = self.node
        return dataclasses.replace(node, codes=taken(node.codes), scale=taken(node.scale), zero=taken(node.zero))


def at_a_time(shape: Sequence[int], axis: int, unit: int) -> int:
    """How many positions along an axis of a weight are dense at a time, of which so many cannot be parted."""
    each = math.prod(shape) // max(shape[axis], 1)
    wanted = max(min(BLOCK // max(each, 1), shape[axis] // 4), shape[axis] // 64)
    return max(wanted // unit, 1) * unit


def added_up(product: Product, x: jax.Array, axis: int, size: int, rows: int, piece: Any) -> jax.Array:
    """A product as the sum of those with parts of the weight, one after the other.

    Args:
      product: of the activation and the weight.
      x: the activation.
      axis: of the weight, summed over.
      size: its length.
      rows: of it, in a part.
      piece: ``piece(start, count)`` is the dense array of some rows.
    """
    other = product.summed[product.contracted.index(axis)]
    wide = jnp.promote_types(product.dtype, jnp.float32)

    def part(start: Any, count: int) -> jax.Array:
        own = jax.lax.dynamic_slice_in_dim(x, start, count, axis=other)
        return product.apply(own, piece(start, count), wide, product.eqn.params["precision"])

    # Of a derivative no part is kept: it is made dense once more.
    step = jax.checkpoint(lambda i, total: total + part(i * rows, rows), prevent_cse=False)
    count = size // rows
    total = jax.lax.fori_loop(1, count, step, part(0, rows))
    if size % rows:
        total = total + part(count * rows, size % rows)
    return total.astype(product.dtype)


def of_codes(leaf: Quantized, **known: Any) -> Weight | None:
    """The operand of codes; None where they are a node themselves, or zero points of groups are."""
    if core.is_node(leaf.codes):
        return None
    if leaf.group_size is not None:
        return None if core.is_node(leaf.zero) else Grouped.of(leaf, **known)
    scale = leaf.scales()
    constant = frozenset(d for d, n in enumerate(scale.shape) if n == 1)
    codes: Any = leaf.codes
    bits = leaf.bits if jnp.issubdtype(codes.dtype, jnp.integer) else None
    if leaf.table is not None or core.is_node(leaf.zero):
        return Weight(leaf.levels(jnp.float32), Shared(scale, constant=constant), None, dtype=leaf.dtype, **known)
    if leaf.bits == 1 and leaf.zero is None:
        codes = 2 * codes + 1
    zero = None if leaf.zero is None else Shared(leaf.zero, constant=constant)
    return Weight(codes, Shared(scale, constant=constant), zero, dtype=leaf.dtype, bits=bits, **known)
