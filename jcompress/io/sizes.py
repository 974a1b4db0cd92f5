"""What a tree will take on disk."""

from __future__ import annotations

from jcompress import core
from jcompress.core import PyTree
from jcompress.io.encoding import encode
from jcompress.io.streams import Store, needing_coder


def nbits(tree: PyTree, *, coded: bool = False) -> int:
    """The exact number of bits that ``tree`` takes when it is saved: nodes as they say, arrays by their dtype.

    Works on shapes too, ``jc.nbits(jax.eval_shape(lambda p: jc.compress(p, plan), shapes))``: exact for N:M patterns
    and wherever sizes do not depend on values. Another mask counts as entries kept at random, as many as its method
    keeps; where that is unknown, as for learned masks or a step that is traced, as one that keeps all, which no mask
    exceeds.

    Args:
      tree: any pytree of nodes, arrays and shapes.
      coded: the bits of a file of ``jc.save(path, tree, coded=True)`` less its manifest, tables and all: the tree is
        coded to learn them, so that it must have values. A multiple of 8, since each array starts with a byte.

    Returns:
      The number of bits, an ``int``.

    Raises:
      StorageError: with ``coded``, for a leaf without values, and without the package that codes.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> w = {"w": jnp.ones((64, 32))}
      >>> jc.nbits(w), jc.nbits(jc.compress(w, jc.plan(w, [("w", jc.quantize.Int(bits=4))])))
      (65536, 9216)
    """
    if not coded:
        return core.nbits(tree)
    store = Store(coded=True)
    with needing_coder("nbits"):
        encode(tree, "", store)
    return 8 * store.nbytes
