"""Values times gates with Gaussian noise."""

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
class Bottleneck(Compressed):
    """Values times gates ``z ~ N(mean, variance)``, an information bottleneck for channels (Dai et al. 2018).

    The paper is arXiv:1802.10399. With a key a sample of the gates; without one their means, and 0 for gates that let
    little through: ``log(variance / mean**2) >= threshold``.

    Attributes:
      values: float array, or a node that stands for one.
      mean: float32 array of length 1 along ``axes`` and else of the shape of ``values``.
      log_variance: float32 array like ``mean``.
      axes: negative axes along which a gate is shared.
      start: the log of the variance at the start of training.
      threshold: of ``log(variance / mean**2)``, from which on a channel is pruned.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> gate = {"mean": jnp.array([[1.0, 0.1]]), "log_variance": jnp.array([[-2.0, -2.0]])}
      >>> jc.formats.Bottleneck(values=jnp.ones((2, 2)), **gate).materialize().tolist()
      [[1.0, 0.0], [1.0, 0.0]]
    """

    values: Any
    mean: Any
    log_variance: Any
    axes: tuple[int, ...] = dataclasses.field(default=(-2,), metadata={"static": True})
    start: float = dataclasses.field(default=-9.0, metadata={"static": True})
    threshold: float = dataclasses.field(default=0.0, metadata={"static": True})
    elementwise: ClassVar[tuple[str, ...]] = ("values",)

    def log_alpha(self) -> jax.Array:
        """The log of each gate's noise-to-signal ratio, ``variance / mean**2``."""
        return gating.log_alpha(core.dense(self.mean), core.dense(self.log_variance))

    def penalty(self) -> jax.Array:
        """``sum log(1 + mean**2 / variance) / 2``: the divergence from the nearest Gaussian about zero.

        It bounds the information that passes, in nats; the paper leaves the factor 1/2 to its multipliers.
        """
        mean, log_variance = core.dense(self.mean), core.dense(self.log_variance)
        return 0.5 * jnp.log1p(jnp.square(mean) * jnp.exp(-log_variance)).sum()

    def materialize(self, *, key: jax.Array | None = None) -> jax.Array:
        values, mean = core.dense(self.values), core.dense(self.mean)
        if key is None:
            return gating.kept_or_zero(self.log_alpha() < self.threshold, values * mean, values)
        noise = jax.random.normal(key, mean.shape, jnp.float32)
        return (values * (mean + jnp.exp(0.5 * core.dense(self.log_variance)) * noise)).astype(values.dtype)

    def project(self, w: jax.Array, where: jax.Array | None = None) -> Bottleneck:
        """The values become ``w``, and the gates what they were at the start, of mean 1."""
        mean = jnp.ones(gating.shared_shape(w.shape, self.axes), jnp.float32)
        return dataclasses.replace(
            self,
            values=core.refitted(self.values, w),
            mean=core.refitted(self.mean, mean),
            log_variance=core.refitted(self.log_variance, jnp.full_like(mean, self.start)),
        )

    def finalize(self) -> Masked:
        return Masked(self.materialize(), self.log_alpha() < self.threshold)
