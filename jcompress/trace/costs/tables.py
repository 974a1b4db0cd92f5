"""The table of a cost, dense and with nodes in the parameters' places."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core
from jcompress.core import PyTree
from jcompress.formats import Arranged, LowRank, Masked, Sum, TensorNetwork
from jcompress.trace.core import chains, walk


@dataclasses.dataclass(frozen=True)
class CostRow:
    """What one parameter costs in one call.

    Attributes:
      path: the parameter.
      shape: of the dense array.
      multiply_adds: of the dense array with activations, padding of convolutions counted as multiplied.
      compressed_multiply_adds: those of the node: only kept entries, one factor after the other, all terms of a sum.
      parameter_bytes: of the dense array.
      stored_bytes: of the node; where masks are not known yet, those of the dense array.
      activation_bytes: read and written by its products.
      bit_operations: multiply-adds x bits of a weight x bits of an activation, dense.
      compressed_bit_operations: the same of the node.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> row = jc.trace.cost(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 2))}, jnp.ones((4, 3))).rows[0]
      >>> row.path, row.multiply_adds, row.parameter_bytes
      ('w', 24.0, 24.0)
    """

    path: str
    shape: tuple[int, ...]
    multiply_adds: float
    compressed_multiply_adds: float
    parameter_bytes: float
    stored_bytes: float
    activation_bytes: float
    bit_operations: float
    compressed_bit_operations: float


_SUMMED = [f.name for f in dataclasses.fields(CostRow)][2:]


@dataclasses.dataclass(frozen=True, repr=False)
class Cost:
    """The result of :func:`jcompress.trace.cost`.

    Attributes:
      rows: one :class:`CostRow` a parameter, in the order of the tree.
      flops: all operations of the dense function but transcendental ones, as XLA's cost analysis counts them.
      transcendentals: exponentials, roots and the like.
      product_multiply_adds: of products between activations, such as attention scores, and of Fourier transforms; in
        no row.
      notes: what was counted in a way that a reader should know.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> cost = jc.trace.cost(lambda p, x: jnp.exp(x @ p["w"]), {"w": jnp.ones((3, 2))}, jnp.ones((4, 3)))
      >>> cost.total.multiply_adds, cost.transcendentals
      (24.0, 8.0)
    """

    rows: tuple[CostRow, ...]
    flops: float
    transcendentals: float
    product_multiply_adds: float
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> CostRow:
        """All parameters together, and the products between activations."""
        sums = {name: float(sum(getattr(row, name) for row in self.rows)) for name in _SUMMED}
        for name in ("multiply_adds", "compressed_multiply_adds"):
            sums[name] += self.product_multiply_adds
        return CostRow("total", (), **sums)

    def compressed(self, tree: PyTree) -> Cost:
        """The cost with other nodes (or arrays) in the parameters' places; nothing is traced again."""
        leaves, stored = dict(walk.leaves(core.untie(tree, whole=False))), dict(walk.leaves(tree))
        if set(leaves) != {row.path for row in self.rows}:
            other = sorted(set(leaves) ^ {row.path for row in self.rows})
            raise ValueError(f"{other[0]}: not in both trees; give parameters of the structure that was counted")
        return dataclasses.replace(
            self, rows=tuple(_compressed(row, leaves[row.path], stored[row.path]) for row in self.rows)
        )

    def __repr__(self) -> str:
        total = self.total
        return f"Cost({_short(total.multiply_adds)} multiply-adds, {_short(total.compressed_multiply_adds)} compressed)"

    def __str__(self) -> str:
        head = ("path", "shape", "multiply-adds", "compressed", "bytes", "stored", "activations", "bit operations")
        rows = [_cells(row) for row in self.rows if row.multiply_adds]
        if self.product_multiply_adds:
            count = _short(self.product_multiply_adds)
            rows.append(("(between activations)", "", count, count, "", "", "", ""))
        table = [head, *rows, _cells(self.total)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(
                x.ljust(w) if i < 2 else x.rjust(w) for i, (x, w) in enumerate(zip(r, widths, strict=True))
            ).rstrip()
            for r in table
        ]
        return "\n".join([*lines, *self.notes])


def _cells(row: CostRow) -> tuple[str, ...]:
    numbers = (
        row.multiply_adds, row.compressed_multiply_adds, row.parameter_bytes, row.stored_bytes, row.activation_bytes,
        row.compressed_bit_operations,
    )  # fmt: skip
    return (row.path, "x".join(map(str, row.shape)), *map(_short, numbers))


def _short(x: float) -> str:
    """A number in three digits, with k, M, G, T."""
    power = min(int(math.log10(x) // 3), 5) if x >= 1 else 0
    return f"{x / 1000**power:.3g}{['', 'k', 'M', 'G', 'T', 'P'][power]}"


def _compressed(row: CostRow, leaf: Any, stored: Any) -> CostRow:
    if not core.is_node(leaf):
        return dataclasses.replace(
            row,
            compressed_multiply_adds=row.multiply_adds,
            stored_bytes=row.parameter_bytes,
            compressed_bit_operations=row.bit_operations,
        )
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(leaf)):
        raise ValueError(
            f"{row.path}: found an abstract {type(leaf).__name__}; cost reads its mask, call it outside jit"
        )
    dense = jax.eval_shape(core.dense, leaf)
    parts = node_products(leaf)
    # The activation's bits, from the dense row, times those of each part.
    each = row.bit_operations / weight_bits(dense)
    return dataclasses.replace(
        row,
        compressed_multiply_adds=row.multiply_adds * sum(part for part, _ in parts),
        stored_bytes=core.leaf_nbits(stored) / 8,
        compressed_bit_operations=each * sum(part * bits for part, bits in parts),
    )


def node_products(x: Any) -> list[tuple[float, int]]:
    """The products that a node (or array) stands for, each with its part of the dense multiply-adds and its bits.

    A mask counts its density (of shapes alone what its method keeps), factors and the terms of a sum count one after
    the other; codes and codebooks multiply like the dense array, at their own width.

    Args:
      x: a node or an array.

    Returns:
      ``(part, bits)`` of each product; parts may sum to more or less than 1.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> w = jnp.arange(64.0).reshape(8, 8)
      >>> jc.trace.node_products(jc.residual(jc.prune.Magnitude(sparsity=0.75), jc.quantize.Int(bits=4))(w))
      [(0.25, 32), (1.0, 4)]
    """
    if not core.is_node(x):
        return [(1.0, weight_bits(x))]
    if isinstance(x, Sum):
        return [pair for term in x.terms for pair in node_products(term)]
    if isinstance(x, Arranged):
        return node_products(x.inner)
    if isinstance(x, TensorNetwork):
        bits = max(bits for factor in x.factors for _, bits in node_products(factor))
        return [(chains.share(x), bits)]
    if isinstance(x, LowRank):
        u, v = (jax.eval_shape(core.dense, factor) for factor in (x.u, x.v))
        dense = u.size // u.shape[-1] * v.shape[-1]
        factors = ((x.u, u.size), (x.v, v.size))
        return [(part * size / dense, bits) for factor, size in factors for part, bits in node_products(factor)]
    if isinstance(x, Masked):
        shape = jax.eval_shape(core.dense, x).shape
        if isinstance(x.mask, jax.ShapeDtypeStruct):  # what its method keeps, where that is known beforehand
            density = 1.0 if x.expected.density is None else x.expected.density
        else:
            density = float(np.broadcast_to(np.asarray(x.mask), shape).mean()) if math.prod(shape) else 1.0
        return [(part * density, bits) for part, bits in node_products(x.values)]
    # What is laid out like the dense array is what a kernel multiplies by: codes, indices, narrow values.
    for name in x.elementwise:
        inner = getattr(x, name)
        if core.is_node(inner):
            return node_products(inner)
        return [(1.0, x.widths().get(name) or weight_bits(inner))]
    return [(1.0, weight_bits(jax.eval_shape(core.dense, x)))]


def weight_bits(x: Any) -> int:
    """Bits of one entry of an array."""
    return 32 if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else core.dtype_bits(x.dtype)
