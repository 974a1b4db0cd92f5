"""Values behind gates that harden as training goes on."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Compressed
from jcompress.formats import gating
from jcompress.formats.masked import Masked
from jcompress.numeric import scaling


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Annealed(Compressed):
    """Values times ``sigmoid((logits - quantile) / temperature)`` for each channel (Ditschuneit & Otterbach 2022).

    The logits are standardised, and the quantile, through which no gradient passes, lies between the k-th largest and
    the next. The temperature falls from ``temperatures[0]`` to ``temperatures[1]``, geometrically over ``steps`` steps,
    so that in the end k gates are one and the rest zero (arXiv:2201.11103). With a key, which is not drawn from,
    ``materialize`` gives this value, that of training; without one that of test time, where the k largest are kept.

    Attributes:
      values: float array, or a node that stands for one.
      logits: float32 array, one a channel, of length 1 along the other axes.
      step: int32 scalar, the training step; held.
      kept: how many channels are kept.
      axis: the negative axis of channels.
      ndim: axes of the dense array of one layer; arrays have more where layers are stacked.
      temperatures: the first and the last.
      steps: the steps from the first to the last.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> logits, step = jnp.array([[3.0, 2.0, 0.0]]), jnp.asarray(10)
      >>> node = jc.formats.Annealed(jnp.ones((1, 3)), logits, step, kept=2, steps=10)
      >>> node.materialize().tolist(), node.materialize(key=jax.random.key(0)).tolist()
      ([[1.0, 1.0, 0.0]], [[1.0, 1.0, 0.0]])
    """

    values: Any
    logits: Any
    step: Any
    kept: int = dataclasses.field(kw_only=True, metadata={"static": True})
    axis: int = dataclasses.field(default=-1, metadata={"static": True})
    ndim: int = dataclasses.field(default=2, metadata={"static": True})
    temperatures: tuple[float, float] = dataclasses.field(default=(1.0, 1e-3), metadata={"static": True})
    steps: int = dataclasses.field(default=1, metadata={"static": True})
    elementwise: ClassVar[tuple[str, ...]] = ("values",)

    def temperature(self) -> jax.Array:
        """The temperature at the step."""
        first, last = self.temperatures
        part = jnp.clip(self.step / self.steps, 0, 1)
        value = first * (last / first) ** part
        return value.reshape(value.shape + (1,) * self.ndim)

    def gate(self) -> jax.Array:
        """The gates of training, in (0, 1)."""
        logits = core.dense(self.logits)
        channels = logits.shape[self.axis]
        if not 0 < self.kept < channels:
            return jnp.full(logits.shape, float(self.kept > 0), logits.dtype)
        deviation = jnp.std(logits, self.axis, keepdims=True)
        standard = (logits - jnp.mean(logits, self.axis, keepdims=True)) / (deviation + gating.TINY)
        cut = jnp.quantile(jax.lax.stop_gradient(standard), 1 - self.kept / channels, self.axis, keepdims=True)
        return jax.nn.sigmoid((standard - cut) / self.temperature())

    def mask(self) -> jax.Array:
        """The channels of the ``kept`` largest logits; ties go to the lower index."""
        order = jnp.argsort(core.dense(self.logits), self.axis, stable=True, descending=True)
        return jnp.argsort(order, self.axis) < self.kept

    def materialize(self, *, key: jax.Array | None = None) -> jax.Array:
        values = core.dense(self.values)
        return gating.kept_or_zero(self.mask(), values, values) if key is None else self._soft(values)

    def _soft(self, values: jax.Array) -> jax.Array:
        return (values * self.gate()).astype(values.dtype)

    def project(self, w: jax.Array, where: jax.Array | None = None) -> Annealed:
        """The values become ``w``, the logits the norms of its channels."""
        others = tuple(i for i in range(-self.ndim, 0) if i != self.axis)
        # The unit does not matter, since logits are standardised.
        norms = jnp.sqrt(jnp.sum(jnp.square(scaling.unit([w]).divide(w)), others, keepdims=True))
        return dataclasses.replace(self, values=core.refitted(self.values, w), logits=core.refitted(self.logits, norms))

    def finalize(self) -> Masked:
        return Masked(self.materialize(), self.mask())
