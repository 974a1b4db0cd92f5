"""Integers to be trained for the size that an entropy coder gives them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core
from jcompress.core import Compressed
from jcompress.formats.quantized import Quantized
from jcompress.numeric.surrogates import round_through


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Latent(Compressed):
    """``exp(log_step) * round(values)``, and the density by which the integers are coded.

    Forward the integers are rounded, backward they are not (straight-through). The density is a mixture of logistic
    distributions; what training adds to its loss are :meth:`bits`, those of values with uniform noise in place of
    rounding (Oktay et al. 2020, arXiv:1906.06624).

    Attributes:
      values: float array in units of the step, or a node that stands for one.
      log_step: float32 array, one number for an array, its axes kept with length 1.
      density: float32 (..., 3, components): logits of the mixture, means, and logs of the scales.
      width: bits of the stored codes, 2 to 16; values stay within them.
      levels: integers from zero to the largest weight, of the step that ``project`` starts at.
      components: distributions in the mixture that it starts at.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> node = jc.formats.Latent(jnp.array([[1.4, -2.0]]), jnp.zeros((1, 1)), jnp.zeros((3, 1)))
      >>> node.materialize().tolist(), jc.finalize({"w": node})["w"].codes.tolist()
      ([[1.0, -2.0]], [[1, -2]])
      >>> round(float(node.bits()), 2)  # -log2 of the logistic's mass within half of 1.4 and of -2.0
      5.88
    """

    values: Any
    log_step: Any
    density: Any
    width: int = dataclasses.field(default=8, metadata={"static": True})
    levels: int = dataclasses.field(default=15, metadata={"static": True})
    components: int = dataclasses.field(default=3, metadata={"static": True})
    elementwise: ClassVar[tuple[str, ...]] = ("values",)

    def materialize(self, *, key: jax.Array | None = None) -> jax.Array:
        values = core.dense(self.values, key=key)
        return (jnp.exp(core.dense(self.log_step)) * self._codes(values)).astype(values.dtype)

    def _codes(self, values: jax.Array) -> jax.Array:
        most = 2.0 ** (self.width - 1) - 1
        return round_through(jnp.clip(values.astype(jnp.float32), -most, most))

    def bits(self, *, key: jax.Array | None = None) -> jax.Array:
        """The bits of all values by the density, float32 (); with a key those of values with uniform noise."""
        values = core.dense(self.values, key=key).astype(jnp.float32)
        if key is not None:
            values = values + jax.random.uniform(key, values.shape, jnp.float32, minval=-0.5, maxval=0.5)
        density = core.dense(self.density)
        lead = density.shape[:-2]  # of stacked layers
        shape = (*lead, *[1] * (values.ndim - len(lead)), density.shape[-1])
        logits, means, logs = (density[..., i, :].reshape(shape) for i in range(3))
        inverse, far = jnp.exp(-logs), jnp.abs(values[..., None] - means)
        # By symmetry on the side where both are small: differences of numbers near 1 would be none.
        mass = jax.nn.sigmoid((0.5 - far) * inverse) - jax.nn.sigmoid((-0.5 - far) * inverse)
        total = jnp.sum(jax.nn.softmax(logits, axis=-1) * mass, axis=-1)
        return -jnp.sum(jnp.log2(jnp.maximum(total, 1e-20)))

    def project(self, w: jax.Array, where: jax.Array | None = None) -> Latent:
        """The values become ``w`` in units of a new step, which the density spans."""
        x = w.astype(jnp.float32)
        shown = x if where is None else jnp.where(where, x, 0.0)
        most = jnp.max(jnp.abs(shown), keepdims=True, initial=0)
        step = most * (1 / self.levels)  # the largest stays where it is, so that a point of the set does
        step = jnp.where(step > jnp.finfo(jnp.float32).tiny, step, 1.0)
        values = (x / step).astype(w.dtype)
        count = x.size if where is None else jnp.sum(jnp.broadcast_to(where, x.shape))
        deviation = jnp.sqrt(jnp.sum((shown / step) ** 2) / jnp.maximum(count, 1))
        sizes = jnp.log(jnp.maximum(deviation, 0.1) * math.sqrt(3) / math.pi)
        nothing = jnp.zeros(self.components, jnp.float32)
        spread = jnp.linspace(-0.7, 0.7, self.components, dtype=jnp.float32) if self.components > 1 else nothing
        density = jnp.stack([nothing, nothing, sizes + spread])
        return dataclasses.replace(
            self,
            values=core.refitted(self.values, values),
            log_step=core.refitted(self.log_step, jnp.log(step)),
            density=core.refitted(self.density, density),
        )

    def finalize(self) -> Quantized:
        values = core.dense(self.values)
        codes = self._codes(values).astype(jnp.int8 if self.width <= 8 else jnp.int16)
        scale = jnp.exp(core.dense(self.log_step))
        axes = tuple(i - scale.ndim for i, n in enumerate(scale.shape) if n == 1)
        return Quantized(codes, scale, bits=self.width, axes=axes, dtype=np.dtype(values.dtype))
