"""Rotations that spread outliers before rounding."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Context, Method
from jcompress.formats import Rotated
from jcompress.layers import matrices
from jcompress.numeric import scaling
from jcompress.quantize.integer import Int


@dataclasses.dataclass(frozen=True)
class Rotation(Method):
    """Quantize in a basis of inputs rotated by a randomized Hadamard matrix, where no weight stands out.

    ``w = R v`` and ``v`` is quantized. The error ``w - R q(v)`` is as long as that of ``v``, which has no outliers: the
    largest of ``n`` weights falls from up to ``|v|`` to about ``|v| sqrt(2 log(n) / n)`` (Ashkboos et al. 2024,
    arXiv:2404.00456; Tseng et al. 2024, arXiv:2402.04396). The rotation acts along axis -2, in each place of a
    convolution's window alike; one bit an input is stored. A kernel sharded by inputs moves between devices.

    Attributes:
      grid: the method that quantizes; with :class:`GPTQ` it gets the Gram matrix of the rotated inputs.
      seed: of the signs.

    Raises:
      ValueError: for a vector, or where statistics say that axis -2 is not contracted.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> w = jnp.cos(jnp.arange(64.0))[:, None].at[3].set(20.0)
      >>> error = lambda method: float(jnp.square(method(w).materialize() - w).sum())
      >>> error(jc.quantize.Rotation(jc.quantize.Int(bits=4))) < 0.2 * error(jc.quantize.Int(bits=4))
      True
    """

    grid: Method = Int(bits=4)
    seed: int = 0

    wraps: ClassVar[tuple[str, ...]] = ("grid",)

    def check(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise for a vector, or if the grid cannot take an array of this shape and dtype."""
        if len(shape) < 2:
            raise ValueError(f"{path}: Rotation needs axis -2, found shape {shape}; keep it dense")
        super().check(path, shape, dtype)

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Rotated:
        """The node for one array."""
        self.check(context.path, w.shape, w.dtype)
        signs = jax.random.bernoulli(jax.random.key(self.seed), jnp.float32(0.5), (w.shape[-2], 1))
        signs = jnp.broadcast_to(signs, (*[1] * (w.ndim - 2), *signs.shape))
        empty = Rotated(None, signs)
        shown = w if context.where is None else jnp.where(context.where, w, jnp.zeros_like(w))
        inner = dataclasses.replace(context, where=None)
        if getattr(context.stats, "gram", None) is not None:
            inner = matrices.with_gram(inner, self._rotated(w, context, empty))
        turned = empty.rotate(shown).astype(w.dtype)
        if core.is_concrete(turned) and not bool(jnp.isfinite(turned).all()):
            raise ValueError(
                f"{context.path}: found magnitudes up to {float(jnp.abs(w).max()):.3g}, and rotated they go beyond "
                f"what {w.dtype} holds; divide the leaf by a power of two, or leave the rotation out"
            )
        return dataclasses.replace(empty, values=self.grid(scaling.inside(turned), inner))

    def _rotated(self, w: jax.Array, context: Context, node: Rotated) -> jax.Array:
        """The Gram matrix of the rotated inputs, (layers, k, k)."""
        layer, gram = matrices.of(w, context, "gram")
        if layer.axes[-1] != w.ndim - 2:
            raise ValueError(
                f"{context.path}: Rotation acts along axis -2 of shape {w.shape}, and the contracted axes are "
                f"{[i - w.ndim for i in layer.axes]}; leave it out"
            )
        n = w.shape[-2]

        def rows(gram: jax.Array) -> jax.Array:
            return (
                Rotated(None, node.signs.reshape(n, 1)).rotate(gram.reshape(-1, n, gram.shape[-1])).reshape(gram.shape)
            )

        return rows(rows(gram).swapaxes(-1, -2)).swapaxes(-1, -2)
