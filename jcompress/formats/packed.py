"""Nodes whose integers and masks take in memory the bits that they take in a file."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core
from jcompress.core import Compressed, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Bits(Compressed):
    """Integers or booleans of a few bits each, eight along the last axis in as many bytes as an element has bits.

    Attributes:
      data: uint8, (..., ceil(length / 8), bits).
      bits: bits an element.
      length: of the last axis.
      kind: dtype of the elements.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> few = jc.formats.Bits.of(jnp.array([[-3, 1, 2, -4, 3, 0, 1, -1, 2]], jnp.int8), 3)
      >>> few.data.shape, few.materialize().tolist()
      ((1, 2, 3), [[-3, 1, 2, -4, 3, 0, 1, -1, 2]])
    """

    data: Any
    bits: int = dataclasses.field(metadata={"static": True})
    length: int = dataclasses.field(metadata={"static": True})
    kind: np.dtype = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, x: jax.Array, bits: int) -> Bits:
        """Pack the lowest bits of each element."""
        return cls(_to_bytes(x, bits), bits, x.shape[-1], np.dtype(x.dtype))

    def materialize(self, *, key: jax.Array | None = None) -> jax.Array:
        lead, width = self.data.shape[:-2], self.bits
        if 8 % width == 0:  # whole elements in each byte
            per = 8 // width
            shifts = jnp.arange(per, dtype=jnp.uint8) * np.uint8(width)
            few = (self.data[..., None] >> shifts) & np.uint8(2**width - 1)
        else:
            flat = (self.data[..., None] >> jnp.arange(8, dtype=jnp.uint8)) & np.uint8(1)
            flat = flat.reshape(*self.data.shape[:-1], -1).reshape(*lead, -1, 8, width)
            few = (flat.astype(jnp.uint32) << jnp.arange(width, dtype=jnp.uint32)).sum(-1)
        few = few.reshape(*lead, -1)[..., : self.length]
        if self.kind == np.bool_ or not jnp.issubdtype(self.kind, jnp.signedinteger):
            return few.astype(self.kind)
        sign = 1 << (width - 1)
        return ((few.astype(jnp.int32) ^ sign) - sign).astype(self.kind)

    def project(self, w: jax.Array, where: jax.Array | None = None) -> Bits:
        return self

    def nbits(self) -> int:
        """Those of the elements, without what fills up the last byte."""
        return self.size * self.bits


@partial(jax.jit, static_argnames="bits")  # in one pass: by itself each step would be written out, 32 bits for a bit
def _to_bytes(x: jax.Array, bits: int) -> jax.Array:
    few = x.astype(jnp.int32 if x.dtype != jnp.uint32 else jnp.uint32).astype(jnp.uint32)
    few = jnp.pad(few, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % 8)])
    few = few.reshape(*x.shape[:-1], -1, 8)
    # Bit j of the element i is bit (i bits + j) of the group.
    flat = (few[..., None] >> jnp.arange(bits, dtype=jnp.uint32)) & 1
    flat = flat.reshape(*few.shape[:-1], bits, 8)
    return (flat << jnp.arange(8, dtype=jnp.uint32)).sum(-1).astype(jnp.uint8)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Packed(Compressed):
    """A node with its integers and masks packed: what :func:`jcompress.pack` makes.

    Attributes:
      node: the node, with :class:`Bits` in the places of arrays.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> node = jc.pack(jc.quantize.Int(bits=4)(jnp.ones((16, 8))))
      >>> node.node.codes.data.nbytes, node.opened().codes.nbytes, node.nbits() // 8
      (64, 128, 96)
    """

    node: Any

    def opened(self) -> Compressed:
        """The node as it was."""
        return jax.tree.map(_opened, self.node, is_leaf=lambda x: isinstance(x, Bits))

    def materialize(self, *, key: jax.Array | None = None) -> jax.Array:
        return self.opened().materialize(key=key)

    def project(self, w: jax.Array, where: jax.Array | None = None) -> Packed:
        return _packed(self.opened().project(w, where))

    def nbits(self) -> int:
        """Those of the node: what is filled up to whole bytes does not count."""
        return self.opened().nbits()


def pack(tree: PyTree) -> PyTree:
    """Let nodes take their stored size on the device too: codes of their bits, masks of one.

    A packed tree goes through the verbs as the tree does: it is materialized, split, trained, saved (as the same file)
    and run by ``jc.accelerate``, which unpack it where it is used, inside the compiled step. Rows are packed along the
    last axis, eight elements at a time, so leading axes are sliced by ``jax.lax.scan`` and sharded as before, and the
    last one where eight elements lie on one device. Masked values keep their places; JAX keeps int4 in a byte, which
    is packed too.

    Args:
      tree: any pytree of arrays and nodes. Arrays, and nodes without integers or masks, stay as they are.

    Returns:
      The tree with :class:`jcompress.formats.Packed` nodes.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> small = {"w": jc.quantize.Int(bits=3)(jnp.ones((64, 64)))}
      >>> sum(x.nbytes for x in jax.tree.leaves(small)), sum(x.nbytes for x in jax.tree.leaves(jc.pack(small)))
      (4352, 1792)
      >>> bool((jc.materialize(jc.pack(small))["w"] == 1).all())
      True
    """
    return jax.tree.map(lambda x: _packed(x) if core.is_node(x) else x, tree, is_leaf=core.is_node)


def unpack(tree: PyTree) -> PyTree:
    """The tree that :func:`jcompress.pack` was given; bit for bit, under ``jit`` too.

    Args:
      tree: any pytree.

    Returns:
      The tree with its nodes as they were.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> tree = {"w": jc.prune.Magnitude(sparsity=0.5)(jnp.arange(8.0))}
      >>> jc.unpack(jc.pack(tree))["w"]
      Masked(values=float32[8], mask=bool[8])
    """
    return core.opened(tree)


def _opened(x: Any) -> Any:
    if not isinstance(x, Bits):
        return x
    return jax.eval_shape(Bits.materialize, x) if isinstance(x.data, jax.ShapeDtypeStruct) else x.materialize()


def _packed(node: Any) -> Any:
    """The node, packed if anything in it is."""
    if isinstance(node, Packed):
        return node
    found = _inside(node)
    return found if found is node else Packed(found)


def _inside(node: Any) -> Any:
    changed = {}
    for field in dataclasses.fields(node):
        x = getattr(node, field.name)
        if field.metadata.get("static") or x is None:
            continue
        new = _field(x, node.widths().get(field.name))
        if new is not x:
            changed[field.name] = new
    return dataclasses.replace(node, **changed) if changed else node


def _field(x: Any, width: int | None) -> Any:
    """What stands in a field: a node, an array, or several of them."""
    if isinstance(x, tuple):
        found = tuple(_field(y, width) for y in x)
        return x if all(a is b for a, b in zip(found, x, strict=True)) else found
    if core.is_node(x):
        return x if isinstance(x, Bits) else _inside(x)
    if not hasattr(x, "dtype") or getattr(x, "ndim", 0) == 0 or jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return x
    if x.dtype != jnp.bool_ and not jnp.issubdtype(x.dtype, jnp.integer):
        return x
    bits = width or core.dtype_bits(x.dtype)
    return Bits.of(jnp.asarray(x), bits) if bits < 8 * np.dtype(x.dtype).itemsize else x
