"""Few rows of an activation against codes: the codes are read as they are, widened in registers, summed as integers.

One row meets each weight once, so the time is that of reading it, and a dense copy costs ten times that. XLA for CPUs
compiles products and sums of int32 to wide instructions where it takes floats one by one. So the activation becomes
integers with a scale for each group, of all the bits that keep sums of some products exact in int32: about those that
float32 has.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jcompress.numeric import meshes
from jcompress.trace.core.contraction import Product
from jcompress.trace.execution import rows
from jcompress.trace.execution.grouped import SMALL, Grouped
from jcompress.trace.execution.weights import Shared, Weight

ROWS = 4
"""Each row widens the codes anew: of more rows a dense copy is made."""
TERMS = (32, 16)
"""Products that are written out and added in int32, their sums as floats; 16 of codes of more than 4 bits, which leave
the activation fewer."""
TERMS_TURNED = (32,)
"""The same where inputs lie side by side: the loop that adds so many is written out, and no other one."""


def product(product: Product, x: jax.Array, w: Weight) -> tuple[jax.Array, str] | None:
    """The product of a few rows with codes, on a CPU; None where it is better made otherwise.

    What is compiled for another device is the plain product, as is what is differentiated.
    """
    found = _group(product, x, w)
    if found is None or jax.default_backend() != "cpu":
        return None
    size, own, bits = found
    scale, zero = (None if s is None else s.array for s in (w.scale, w.zero))

    def plain(x: jax.Array, codes: jax.Array, scale: jax.Array, zero: Any) -> jax.Array:
        known: dict[str, Any] = {
            name: s and Shared(a, constant=s.constant)
            for name, s, a in (("scale", w.scale, scale), ("zero", w.zero, zero))
        }
        return product.apply(x, dataclasses.replace(w, values=codes, **known).dense())

    def fast(x: jax.Array, codes: jax.Array, scale: jax.Array, zero: Any) -> jax.Array:
        few = rows.of(product, x, codes.ndim)
        assert few is not None
        y = multiplied(few.x, codes, scale if own else None, zero, size, few.turned, bits)
        return few.restored(y if own else y * scale.reshape(1, -1).astype(jnp.float32))

    def either(*operands: Any) -> jax.Array:
        return jax.lax.platform_dependent(*operands, cpu=fast, default=plain)

    y = rows.with_derivative_of(plain, either, x, w.values, scale, zero)
    shared = "codes in groups" if own else f"{w.values.dtype} codes, scaled after the product"
    return y, f"{shared}, summed as integers for few rows"


def _group(product: Product, x: jax.Array, w: Weight) -> tuple[int, bool, int] | None:
    """How many inputs share a scale, whether codes do, and the bits of a code but for a sign; or None."""
    few = rows.of(product, x, w.values.ndim)
    if few is None or few.x.shape[0] > ROWS or w.bits is None or w.bits > 8 or w.values.size < SMALL:
        return None
    if not jnp.issubdtype(w.values.dtype, jnp.integer) or any(map(meshes.is_explicit, (x, w.values))):
        return None
    inputs, bits = few.x.shape[1], w.bits - (w.zero is None and jnp.issubdtype(w.values.dtype, jnp.signedinteger))
    if isinstance(w, Grouped):
        size = w.group_of(product.contracted[0])
    else:
        size = terms_of(inputs, few.turned, bits) if w.has_scale_of_outputs(product) else None
    whole = size and not inputs % size and terms_of(size, few.turned, bits)
    return (size, isinstance(w, Grouped), bits) if size and whole else None


def terms_of(size: int, turned: bool, bits: int) -> int | None:
    """How many products of a group are added as integers at a time."""
    choice = TERMS_TURNED if turned else TERMS[1:] if bits > 4 else TERMS
    return next((n for n in choice if size % n == 0), None)


def multiplied(
    x: jax.Array,
    codes: jax.Array,
    scale: jax.Array | None,
    zero: jax.Array | None,
    size: int,
    turned: bool,
    bits: int,
) -> jax.Array:
    """``x @ (scale * (codes - zero))`` for a few rows.

    Args:
      x: (rows, inputs).
      codes: integers (inputs, outputs), or (outputs, inputs) where ``turned``.
      scale: alike, a number for each group; None for the caller to apply.
      zero: of the shape of ``scale``, or one for each output; or None.
      size: inputs that share a scale of the activation, and of the codes if these have one.
      turned: how the codes lie.
      bits: of a code, but for a sign.

    Returns:
      float32 (rows, outputs).
    """
    terms = terms_of(size, turned, bits)
    assert terms is not None
    # Terms of x (with a sign) times a code stay below 2**31; more than float32 has would be no use.
    few, own = rows.fixed(x.reshape(x.shape[0], -1, size), min(32 - bits - (terms - 1).bit_length(), 25))
    few = few.reshape(x.shape[0], -1, size // terms, terms)
    one = _turned if turned else _straight
    return jnp.concatenate([one(few[i], own[i], codes, scale, zero) for i in range(x.shape[0])])


def _straight(few: jax.Array, own: jax.Array, codes: jax.Array, scale: Any, zero: Any) -> jax.Array:
    """One row, (groups, parts, terms): outputs lie side by side, so the sum over inputs is written out for them all."""
    terms = few.shape[2]
    xs, cs = few.reshape(-1, terms), codes.reshape(-1, terms, codes.shape[1])
    each = [xs[:, i, None] * cs[:, i].astype(jnp.int32) for i in range(terms)]
    sums = sum(each[1:], each[0]).reshape(*few.shape[:2], -1)
    if zero is not None:
        sums = sums - few.sum(2, keepdims=True) * zero.astype(jnp.int32)[:, None]
    factor = own if scale is None else own * scale.astype(jnp.float32)
    return (sums.astype(jnp.float32).sum(1) * factor).sum(0)[None]


def _turned(few: jax.Array, own: jax.Array, codes: jax.Array, scale: Any, zero: Any) -> jax.Array:
    """One row: inputs lie side by side."""
    sums = (few * codes.reshape(-1, *few.shape).astype(jnp.int32)).sum(3)
    if zero is not None:
        sums = sums - few.sum(2) * zero.astype(jnp.int32)[:, :, None]
    factor = own[:, 0] if scale is None else own[:, 0] * scale.astype(jnp.float32)
    return (sums.astype(jnp.float32).sum(2) * factor).sum(1)[None]
