"""Values behind stochastic gates that are exactly zero, or exactly one, with positive probability."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Compressed
from jcompress.formats import gating
from jcompress.formats.masked import Masked


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Gated(Compressed):
    """Values times gates ``z = clip(s (zeta - gamma) + gamma, 0, 1)`` (Louizos et al. 2018, arXiv:1712.01312).

    With a key, ``s = sigmoid((log u - log(1 - u) + log_alpha) / temperature)`` for a uniform u, drawn anew for each
    gate; without one, ``s = sigmoid(log_alpha)``, the gate at test time. ``stretch`` is ``(gamma, zeta)``.

    Attributes:
      values: float array, or a node that stands for one.
      log_alpha: float32 array of length 1 along ``axes`` and else of the shape of ``values``.
      axes: negative axes along which a gate is shared; empty for a gate for every weight.
      keep: where gates start: ``log_alpha = log(keep / (1 - keep))``.
      temperature: of the samples, in (0, 1).
      stretch: ``gamma < 0`` and ``zeta > 1``.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> node = jc.formats.Gated(values=jnp.array([3.0, 4.0]), log_alpha=jnp.array([9.0, -9.0]))
      >>> node.materialize().tolist(), jc.finalize(node)
      ([3.0, 0.0], Masked(values=float32[2], mask=bool[2]))
    """

    values: Any
    log_alpha: Any
    axes: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    keep: float = dataclasses.field(default=0.9, metadata={"static": True})
    temperature: float = dataclasses.field(default=2 / 3, metadata={"static": True})
    stretch: tuple[float, float] = dataclasses.field(default=(-0.1, 1.1), metadata={"static": True})
    elementwise: ClassVar[tuple[str, ...]] = ("values",)

    def gate(self, key: jax.Array | None = None) -> jax.Array:
        """The gates, float32 in [0, 1]: a sample, or those of test time without a key."""
        logits = core.dense(self.log_alpha).astype(jnp.float32)
        if key is not None:
            logits = (logits + jax.random.logistic(key, logits.shape, jnp.float32)) / self.temperature
        low, high = self.stretch
        return jnp.clip(jax.nn.sigmoid(logits) * (high - low) + low, 0, 1)

    def probability(self) -> jax.Array:
        """The probability that a gate is not zero, ``sigmoid(log_alpha - temperature log(-gamma / zeta))``."""
        low, high = self.stretch
        return jax.nn.sigmoid(core.dense(self.log_alpha).astype(jnp.float32) - self.temperature * math.log(-low / high))

    def penalty(self) -> jax.Array:
        """The expected number of weights that are not zero."""
        each = self.probability()
        return each.sum() * (core.dense(self.values).size / max(each.size, 1))

    def materialize(self, *, key: jax.Array | None = None) -> jax.Array:
        values, gate = core.dense(self.values), self.gate(key)
        return gating.kept_or_zero(gate > 0, values * gate, values)

    def project(self, w: jax.Array, where: jax.Array | None = None) -> Gated:
        """Gates as at the start, and the values that give ``w`` behind them."""
        logits = jnp.full(gating.shared_shape(w.shape, self.axes), math.log(self.keep / (1 - self.keep)), jnp.float32)
        start = dataclasses.replace(self, log_alpha=core.refitted(self.log_alpha, logits))
        values = (w / start.gate()).astype(w.dtype)
        return dataclasses.replace(start, values=core.refitted(self.values, values))

    def finalize(self) -> Masked:
        return Masked(self.materialize(), self.gate() > 0)
