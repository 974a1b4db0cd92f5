"""Functions run on compressed parameters, the activations as they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jcompress.trace.core.contraction import Product
from jcompress.trace.execution import integers
from jcompress.trace.execution.execute import Executed
from jcompress.trace.execution.grouped import Grouped
from jcompress.trace.execution.kernels import Kernels
from jcompress.trace.execution.weights import Weight


def accelerate(fn: Callable[..., Any], *, kernels: Kernels | None = None) -> Executed:
    """The function run on compressed parameters without making them dense where there is a shorter way.

    ``x @ w`` is ``(x @ u) @ v`` for a :class:`~jcompress.formats.LowRank` node that is thin enough to cost less,
    ``(x @ levels) * scale`` for a :class:`~jcompress.formats.Quantized` one with a scale for each output, also under
    a mask, and the sum of both for their sum. Convolutions are taken alike. Of codes in groups one block of groups at a
    time is made dense, multiplied and added up, where the activation has few rows. An activation is contracted into a
    :class:`~jcompress.formats.TensorNetwork` along the cheapest path, or goes through a chain of smaller convolutions.
    Of a :class:`~jcompress.formats.Codebook` and of :class:`~jcompress.formats.Coded` weights, rotated or not, a part
    at a time is made dense in the same way; where words are of several inputs of one output, no more rows than a word
    has entries meet the words alone, and each output adds up the products of its words.
    Circulant matrices and a :class:`~jcompress.formats.FastProduct` multiply by fast transforms where they are large.
    Of a mask that hides whole blocks, and whose values are known where the function is compiled
    (``jax.jit(lambda x: fast_fn(tree, x))``), the kept blocks are multiplied, where they are few enough to be faster.
    On a CPU up to four rows of an activation meet codes as integers of about the digits that float32 has. Rows that a
    function looks up in a table of codes are all that is made dense of it. A node of :func:`jcompress.pack` is sliced
    by loops as it is, and unpacked where it is multiplied.
    All other nodes are made dense, and ``report`` says which. Activations stay as they are otherwise;
    :func:`jcompress.quantize.activations` multiplies integers.

    The function is traced and run equation by equation, loops and ``remat`` staying what they are, so call it under
    ``jit``. It can be differentiated in the trainable leaves of the nodes. A function with a derivative of its own
    that multiplies a parameter inside is taken in and its derivative lost, as ``report`` says.

    Args:
      fn: any JAX function of ``(params, *args)``.
      kernels: :class:`jcompress.trace.Kernels`, to let products be made by kernels where those are faster; it keeps
        what it measured, so give one to all functions. None for none.

    Returns:
      An :class:`Executed`: ``fast_fn(tree, *args)``, where the tree has the paths of ``params`` and holds nodes or
      arrays, and ``fast_fn.report(tree, *args)``, a table.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> fn = lambda params, x: jnp.tanh(x @ params["a"]) @ params["b"]
      >>> params = {"a": jnp.ones((16, 16)), "b": jnp.ones((16, 4))}
      >>> plan = jc.plan(params, [("a", jc.factorize.SVD(rank=2)), ("b", jc.quantize.Int(bits=8, group_size=8))])
      >>> tree, x = jc.compress(params, plan), jnp.ones((3, 16))
      >>> fast_fn = jc.accelerate(fn)
      >>> bool(jnp.allclose(fast_fn(tree, x), fn(jc.materialize(tree), x), rtol=1e-5))
      True
      >>> print(fast_fn.report(tree, x))
      path  product      shape  how
      a     dot_general  16x2   dense: a factor
      a     dot_general  2x16   dense: a factor
      b     dot_general  16x4   dense: groups along the contraction, for a small weight
    """
    return Executed(fn, WeightsOnly(kernels))


@dataclasses.dataclass(frozen=True)
class WeightsOnly:
    """Products of activations as they are with codes, scaled afterwards."""

    kernels: Kernels | None = None
    by_blocks: ClassVar[bool] = True

    def multiply(self, product: Product, x: jax.Array, w: Weight, axes: tuple[int, ...]) -> tuple[jax.Array, str]:
        """The product, and how it was made."""
        if self.kernels is not None and (made := self.kernels.product(product, x, w)) is not None:
            return made
        if (made := integers.product(product, x, w)) is not None:
            return made
        if isinstance(w, Grouped):
            return w.by_blocks(product, x)
        if not w.has_scale_of_outputs(product):
            return product.apply(x, w.dense()), w.told("dense", product)
        both = jnp.promote_types(x.dtype, w.dtype)
        if w.bits is not None and w.bits > _exact_bits(both):
            return product.apply(x, w.dense()), f"dense: {both} holds no codes of {w.bits} bits"
        assert w.scale is not None
        wide = jnp.promote_types(product.dtype, jnp.float32)
        y = product.apply(x, w.levels(both), wide, product.eqn.params["precision"])
        scale = product.of_weight(w.scale.array, x.ndim).astype(wide)
        return (y * scale).astype(product.dtype), f"{w.values.dtype} levels, scaled after the product"


def _exact_bits(dtype: Any) -> int:
    """How wide codes may be that a float dtype holds exactly, zero points subtracted."""
    return int(jnp.finfo(dtype).nmant) + 1 if jnp.issubdtype(dtype, jnp.floating) else 8
