"""Weights with a Gaussian posterior, each with a mean and a variance of its own."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Compressed
from jcompress.formats import gating
from jcompress.formats.masked import Masked


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Gaussian(Compressed):
    """``w ~ N(mean, variance)``, independent for each weight (Molchanov et al. 2017, arXiv:1701.05369).

    With a key a sample, ``mean + sqrt(variance) * normal``. Without one the mean, and 0 for weights whose dropout rate
    ``alpha = variance / mean**2`` is high: ``log alpha >= threshold``.

    Attributes:
      mean: float array, or a node that stands for one.
      log_variance: float32 array of the same shape.
      start: the log of alpha at the start of training.
      threshold: of log alpha, from which on a weight is pruned.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> node = jc.formats.Gaussian(mean=jnp.array([1.0, 0.1]), log_variance=jnp.zeros(2))
      >>> node.materialize().tolist()
      [1.0, 0.0]
    """

    mean: Any
    log_variance: Any
    start: float = dataclasses.field(default=-6.0, metadata={"static": True})
    threshold: float = dataclasses.field(default=3.0, metadata={"static": True})
    elementwise: ClassVar[tuple[str, ...]] = ("mean", "log_variance")

    def log_alpha(self) -> jax.Array:
        """The log of each weight's dropout rate."""
        return gating.log_alpha(core.dense(self.mean), core.dense(self.log_variance))

    def moments(self) -> tuple[jax.Array, jax.Array]:
        """Mean and variance of each weight, in float32."""
        return core.dense(self.mean).astype(jnp.float32), jnp.exp(core.dense(self.log_variance).astype(jnp.float32))

    def penalty(self) -> jax.Array:
        """The divergence from the log-uniform prior, up to its constant: 0 where alpha is infinite."""
        return log_uniform_divergence(self.log_alpha()).sum()

    def materialize(self, *, key: jax.Array | None = None) -> jax.Array:
        mean = core.dense(self.mean)
        if key is None:
            return gating.kept_or_zero(self.log_alpha() < self.threshold, mean, mean)
        centre, variance = self.moments()
        return (centre + jnp.sqrt(variance) * jax.random.normal(key, mean.shape, jnp.float32)).astype(mean.dtype)

    def project(self, w: jax.Array, where: jax.Array | None = None) -> Gaussian:
        """The mean becomes ``w``, and every dropout rate what it was at the start."""
        log_variance = self.start - gating.log_alpha(w, jnp.zeros((), jnp.float32))
        return dataclasses.replace(
            self, mean=core.refitted(self.mean, w), log_variance=core.refitted(self.log_variance, log_variance)
        )

    def finalize(self) -> Masked:
        return Masked(self.materialize(), self.log_alpha() < self.threshold)


def log_uniform_divergence(log_alpha: jax.Array) -> jax.Array:
    """KL of Gaussian noise of rate alpha from the log-uniform prior, approximated, up to a constant.

    ``-KL = k1 sigmoid(k2 + k3 log alpha) - log(1 + 1 / alpha) / 2 - k1``, within 0.009 nats of the exact value
    (Molchanov et al. 2017, arXiv:1701.05369, equation 14).
    """
    k1, k2, k3 = 0.63576, 1.87320, 1.48695
    return k1 - k1 * jax.nn.sigmoid(k2 + k3 * log_alpha) + 0.5 * jax.nn.softplus(-log_alpha)
