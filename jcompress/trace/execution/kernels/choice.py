"""Which products are made by kernels: those that were faster where they run, found once for each shape."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jcompress.numeric import meshes
from jcompress.trace.core.contraction import Product
from jcompress.trace.execution import rows
from jcompress.trace.execution.grouped import Grouped
from jcompress.trace.execution.kernels.platforms import TARGETS, WIDTHS, Codes, Target
from jcompress.trace.execution.weights import Shared, Weight

ROWS = 128
"""Rows of an activation up to which codes are worth widening again for each block of outputs."""
ROWS_TURNED = 8
"""The same where inputs lie side by side: each row is a product of its own."""


@dataclasses.dataclass(eq=False)
class Kernels:
    """Kernels for products with compressed weights, for :func:`jcompress.accelerate`.

    Codes of 2, 4 and 8 bits in groups or with a scale an output, packed (:func:`jcompress.pack`) or a byte each, are
    multiplied without a dense copy, and so are kept blocks. The first time that a product is met in some shape, on a
    TPU or a GPU, the kernel and the plain product are compiled and timed on random numbers, and the faster one is
    used from then on; a kernel that its compiler refuses is never used. Elsewhere the plain product is used.

    Of arrays that are sharded nothing is known while a function is traced, so use it where weights lie on one device.

    Args:
      when: ``"measured"``; ``"always"`` where there is a kernel; ``"interpret"`` runs kernels as JAX operations, for
        tests on any machine, slowly.

    Attributes:
      found: what was measured: for each product the seconds of a kernel (None where it was refused) and of the plain
        product.

    Raises:
      ValueError: for another ``when``.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params, x = {"w": jnp.eye(64, 128)}, jnp.ones((1, 64))
      >>> plan = jc.plan(params, [("w", jc.quantize.Int(bits=4, group_size=32))])
      >>> fast = jc.accelerate(lambda p, x: x @ p["w"], kernels=jc.trace.Kernels("interpret"))
      >>> print(fast.report(jc.pack(jc.compress(params, plan)), x))
      path  product      shape   how
      w     dot_general  64x128  kernel: packed codes of 4 bits, groups of 32
    """

    when: Literal["measured", "always", "interpret"] = "measured"
    found: dict[tuple[Any, ...], tuple[float | None, float]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.when not in ("measured", "always", "interpret"):
            raise ValueError(f"Kernels: when={self.when!r} is unknown; use 'measured', 'always' or 'interpret'")

    @property
    def target(self) -> Target | None:
        """What kernels are compiled for here; None where there is nothing."""
        return TARGETS.get("interpret" if self.when == "interpret" else jax.default_backend())

    def product(self, product: Product, x: jax.Array, w: Weight) -> tuple[jax.Array, str] | None:
        """A product of codes by a kernel, and how; None where there is none, or it is slower."""
        target, read = self.target, _read(product, x, w)
        if target is None or read is None:
            return None
        held, own = read
        scale, zero = (None if s is None else s.array for s in (w.scale, w.zero))

        def plain(x: jax.Array, data: jax.Array, scale: jax.Array, zero: Any) -> jax.Array:
            known: dict[str, Any] = {
                k: s and Shared(a, constant=s.constant)
                for k, s, a in (("scale", w.scale, scale), ("zero", w.zero, zero))
            }
            values = data if w.packed is None else dataclasses.replace(w.packed, data=data).materialize()
            return product.apply(x, dataclasses.replace(w, values=values, packed=None, **known).dense())

        def kernel(x: jax.Array, data: jax.Array, scale: jax.Array, zero: Any) -> jax.Array:
            few = rows.of(product, x, 2)
            assert few is not None
            from jcompress.trace.execution.kernels import codes  # pallas is loaded where a kernel is

            flat = data.reshape(data.shape[0], -1).view(jnp.uint8)
            made: Callable[..., jax.Array] = codes.by_columns if few.turned else codes.by_rows
            near = few.x if few.x.dtype == jnp.bfloat16 else few.x.astype(jnp.float32)
            y = made(near, flat, *((scale, zero) if own else (None, None)), held, target)
            return few.restored(y if own else y * scale.reshape(1, -1).astype(jnp.float32))

        data = w.values if w.packed is None else w.packed.data
        name = f"{'packed ' if w.packed is not None else ''}codes of {held.bits} bits"
        name += f", groups of {held.group}" if own else ""
        if not self.pays((name, *product_key(product, x)), kernel, plain, (x, data, scale, zero)):
            return None
        return rows.with_derivative_of(plain, kernel, x, data, scale, zero), f"kernel: {name}"

    def blocks(
        self, product: Product, x: jax.Array, values: jax.Array, mask: np.ndarray
    ) -> tuple[jax.Array, str] | None:
        """A product with the kept blocks of a matrix by a kernel, and how; None where there is none, or it is slower.

        Args:
          product: of the activation and the matrix.
          x: the activation.
          values: the matrix, of known values.
          mask: boolean, an entry a block.
        """
        target, few = self.target, rows.of(product, x, values.ndim)
        if target is None or few is None or few.x.shape[0] > ROWS or not mask.any():
            return None
        size, mask = values.shape[0] // mask.shape[0], mask.T if few.turned else mask
        inputs = np.concatenate([np.flatnonzero(column) for column in mask.T])
        with jax.ensure_compile_time_eval():
            w = values.T if few.turned else values
            held = w.reshape(mask.shape[0], size, mask.shape[1], size).transpose(2, 0, 1, 3)[mask.T]

        def kernel(x: jax.Array) -> jax.Array:
            from jcompress.trace.execution.kernels import kept

            own = rows.of(product, x, 2)
            assert own is not None
            near = own.x if own.x.dtype == jnp.bfloat16 else own.x.astype(jnp.float32)
            return own.restored(kept.by_blocks(near, held, inputs, mask.sum(0), target))

        def plain(x: jax.Array) -> jax.Array:
            return product.apply(x, values)

        name = f"{mask.mean():.0%} of its blocks of {size}x{size}"
        if not self.pays((name, values.shape, *product_key(product, x)), kernel, plain, (x,)):
            return None
        return rows.with_derivative_of(plain, kernel, x), f"kernel: {name}"

    def pays(self, key: tuple[Any, ...], kernel: Callable[..., Any], plain: Callable[..., Any], operands: Any) -> bool:
        """Whether a kernel is to be used: measured once for each key.

        Args:
          key: what tells products from one another.
          kernel: one way.
          plain: the other way.
          operands: of both: arrays, or None.
        """
        if self.when != "measured":
            return True
        key = (jax.devices()[0].device_kind, *key, *(None if x is None else (x.shape, str(x.dtype)) for x in operands))
        if key not in self.found:
            with jax.ensure_compile_time_eval():
                examples = [None if x is None else _example(x) for x in operands]
            self.found[key] = _seconds(kernel, examples), _seconds(plain, examples) or 0.0
        by_kernel, by_plain = self.found[key]
        return by_kernel is not None and by_kernel < by_plain


def product_key(product: Product, x: jax.Array) -> tuple[Any, ...]:
    """What tells products of the same operands from one another."""
    return (getattr(product, "side", None), str(getattr(product, "numbers", "")), str(product.dtype))


def _example(x: jax.Array) -> jax.Array:
    """Some numbers in place of an array that has no values yet."""
    if jnp.issubdtype(x.dtype, jnp.integer):
        return (jnp.arange(x.size, dtype=jnp.int32) % 7).astype(x.dtype).reshape(x.shape)
    return (1 + jnp.arange(x.size, dtype=jnp.float32) % 7).astype(x.dtype).reshape(x.shape)


def _seconds(call: Callable[..., Any], operands: Sequence[Any]) -> float | None:
    """The median time of a call; None where it cannot be compiled for this device."""
    given = [x for x in operands if x is not None]

    def filled(*arrays: Any) -> Any:
        left = iter(arrays)
        return call(*(None if x is None else next(left) for x in operands))

    try:
        compiled = jax.jit(filled).lower(*given).compile()
        jax.block_until_ready(compiled(*given))
    except Exception:  # whatever a compiler of kernels does not take; what is wrong with the product, plain shows too
        return None
    times = []
    for _ in range(20):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*given))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _read(product: Product, x: jax.Array, w: Weight) -> tuple[Codes, bool] | None:
    """How the codes of a weight are read by a kernel, and whether groups share a scale; None where none does."""
    few = rows.of(product, x, w.values.ndim)
    if few is None or w.bits is None or w.values.size == 0 or x.size == 0 or w.values.dtype.itemsize > 1:
        return None
    if few.x.shape[0] > (ROWS_TURNED if few.turned else ROWS) or any(map(meshes.is_explicit, (x, w.values))):
        return None
    bits = w.bits if w.packed is not None else 8
    signed = jnp.issubdtype(w.values.dtype, jnp.signedinteger)
    own = isinstance(w, Grouped)
    group = w.group_of(product.contracted[0]) if isinstance(w, Grouped) else None
    if bits not in WIDTHS or w.bits == 1 or not jnp.issubdtype(w.values.dtype, jnp.integer):
        return None
    if not own and (not w.has_scale_of_outputs(product) or w.zero is not None):
        return None
    if own and (group is None or group < 16 or group & (group - 1)):
        return None
    full = w.scale is not None and (not own or w.scale.array.shape[1 - product.contracted[0]] > 1)
    return (Codes(bits, bool(signed), group, w.values.shape[1]), own) if full else None
