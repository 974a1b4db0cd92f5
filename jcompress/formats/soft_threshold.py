"""Arrays shrunk by a learned threshold."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Compressed
from jcompress.formats.masked import Masked

_OPEN = -10.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class SoftThreshold(Compressed):
    """``sign(weights) * max(|weights| - sigmoid(logit), 0)``: the threshold learns along with the weights.

    A weight above the threshold passes its gradient on, one below passes none; the logit gets
    ``-sum(g * sign(weights) * sigmoid'(logit))`` over the weights above. Weight decay on the logit drives it towards
    0, so the threshold up.

    Attributes:
      weights: float array, or a node that stands for one.
      logit: float array or node, a scalar for each array; where arrays are stacked, one for each.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> node = jc.formats.SoftThreshold(weights=jnp.array([2.0, -0.25]), logit=jnp.zeros(()))
      >>> node.materialize().tolist()
      [1.5, 0.0]
    """

    weights: Any
    logit: Any
    elementwise: ClassVar[tuple[str, ...]] = ("weights",)

    def materialize(self, *, key: jax.Array | None = None) -> jax.Array:
        weights = core.dense(self.weights, key=key)
        logit = core.dense(self.logit, key=key)
        logit = logit.reshape(logit.shape + (1,) * (weights.ndim - logit.ndim))
        over = jnp.abs(weights) - jax.nn.sigmoid(logit).astype(weights.dtype)
        # Not relu and sign: at a weight of zero their product would give -0.0.
        return jnp.where(over > 0, jnp.sign(weights) * over, jnp.zeros_like(weights))

    def project(self, w: jax.Array, where: jax.Array | None = None) -> SoftThreshold:
        logit = core.refitted(self.logit, jnp.full(self._stack(), _OPEN, jnp.float32))
        over = jax.nn.sigmoid(core.dense(logit)).astype(w.dtype)
        wider = w + jnp.sign(w) * over.reshape(over.shape + (1,) * (w.ndim - over.ndim))
        return dataclasses.replace(self, weights=core.refitted(self.weights, wider, where), logit=logit)

    def _stack(self) -> tuple[int, ...]:
        logit = self.logit
        while core.is_node(logit):  # of a node whose trainable leaves are elsewhere what lies like the array is there
            logit = next((x for name in logit.elementwise if (x := getattr(logit, name)) is not None), None)
        return () if logit is None else logit.shape

    def finalize(self) -> Masked | SoftThreshold:
        if core.is_node(self.weights):
            return self  # what weights are stored in would be lost
        values = self.materialize()
        return Masked(values, values != 0)
