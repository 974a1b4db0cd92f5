"""Packed nodes inside a function: sliced by loops as they are, and unpacked where they are multiplied."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.formats import Bits, Packed, Quantized
from jcompress.trace.core import walk
from jcompress.trace.core.contraction import Product
from jcompress.trace.core.flow import Step
from jcompress.trace.core.layouts import Cast
from jcompress.trace.execution.grouped import of_codes
from jcompress.trace.execution.rows import Lookup
from jcompress.trace.execution.weights import Multiply, Range, Tell, Weight, static


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Compact:
    """A packed node of codes, laid out as the value it stands for.

    Attributes:
      node: with :class:`~jcompress.formats.Bits` for its codes.
      ranges: as for :class:`Weight`.
      path: the parameter.
    """

    node: Quantized
    ranges: dict[tuple[int, ...], Range] = dataclasses.field(default_factory=dict)
    path: str = static("")

    def opened(self) -> Weight:
        """The operand of the node as it was, which knows how it lies packed."""
        found = of_codes(self._node, ranges=self.ranges, path=self.path)
        assert found is not None
        return dataclasses.replace(found, packed=self.node.codes)

    @property
    def _node(self) -> Quantized:
        return Packed(self.node).opened()  # type: ignore[return-value]  # a packed node is opened as what it was

    def dense(self) -> jax.Array:
        """The array it stands for."""
        return self._node.materialize()

    def laid_out(self, step: Step) -> Any:
        """As for :class:`Weight`; another layout than a cast's opens it."""
        if isinstance(step.flow, Cast):
            dtype = jnp.dtype(walk.aval(step.eqn.outvars[0]).dtype)
            return [dataclasses.replace(self, node=dataclasses.replace(self.node, dtype=dtype))]
        return self.opened().laid_out(step)

    def stacked(self) -> Compact:
        """As for :class:`Weight`."""
        n = self.node.codes.data.shape[0]
        known = jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *x.shape[1:])), (self.node, self.ranges))
        return dataclasses.replace(self, node=known[0], ranges=known[1])

    def product(self, product: Product, x: jax.Array, multiply: Multiply, tell: Tell) -> jax.Array:
        """The product with an activation."""
        return self.opened().product(product, x, multiply, tell)

    def looked_up(self, lookup: Lookup) -> jax.Array:
        """As for :class:`Weight`: of a packed table the rows are unpacked."""
        codes = dataclasses.replace(self.node.codes, data=lookup.taken(self.node.codes.data)).materialize()
        few, opened = dataclasses.replace(self._node, codes=codes), self.opened()
        coded = opened.zero is not None or (few.table is None and few.bits != 1)
        is_levels = type(opened) is Weight and not coded  # of those a weight holds what its scale multiplies
        return opened.looked_up(lookup, few.levels(jnp.float32) if is_levels else codes)


def of_packed(path: str, leaf: Any, ranges: dict[tuple[int, ...], Range]) -> Compact | None:
    """The operand of a packed node of codes; None for another leaf."""
    node = leaf.node if isinstance(leaf, Packed) else None
    if not isinstance(node, Quantized) or not isinstance(node.codes, Bits):
        return None
    held = (x for x in (node.scale, node.zero) if core.is_node(x) and not isinstance(x, Bits))
    return None if any(True for _ in held) else Compact(node, ranges, path=path)
