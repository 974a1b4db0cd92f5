"""Weights under a group normal-Jeffreys prior."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Compressed
from jcompress.formats import gating
from jcompress.formats.gaussian import log_uniform_divergence
from jcompress.formats.masked import Masked


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Jeffreys(Compressed):
    """``w = z * v`` with ``v ~ N(mean, variance)`` a weight and ``z`` Gaussian, one scale a group.

    The prior of a weight given its scale is ``N(0, z**2)`` and that of a scale ``p(z) ~ 1 / |z|``, which Jeffreys'
    rule gives for it (Louizos et al. 2017, arXiv:1705.08665, section 4.1). With a key a sample; without one the mean
    ``E[z] mean``, and 0 for groups whose scale is mostly noise: ``log(variance of z / (mean of z)**2) >= threshold``.

    Attributes:
      mean: float array, or a node that stands for one.
      log_variance: float32 array of the same shape.
      group_mean: float32, of length 1 along ``axes``, else of the shape of ``mean``: the means of the scales.
      group_log_variance: the logs of their variances.
      axes: negative axes along which a scale is shared.
      start: the log of all variances at the start of training, where scales have the mean 1.
      threshold: of the log of a scale's dropout rate, from which on a group is pruned.

    Example:
      >>> import dataclasses, jax.numpy as jnp, jcompress as jc
      >>> node = jc.prune.NormalJeffreys()(jnp.ones((2, 3)))
      >>> dataclasses.replace(node, group_mean=jnp.array([[2.0], [1e-4]])).materialize().tolist()
      [[2.0, 2.0, 2.0], [0.0, 0.0, 0.0]]
    """

    mean: Any
    log_variance: Any
    group_mean: Any
    group_log_variance: Any
    axes: tuple[int, ...] = dataclasses.field(default=(-1,), metadata={"static": True})
    start: float = dataclasses.field(default=-9.0, metadata={"static": True})
    threshold: float = dataclasses.field(default=-3.0, metadata={"static": True})
    elementwise: ClassVar[tuple[str, ...]] = ("mean", "log_variance")

    def log_alpha(self) -> jax.Array:
        """The log of each scale's dropout rate, ``variance / mean**2``."""
        return gating.log_alpha(core.dense(self.group_mean), core.dense(self.group_log_variance))

    def moments(self) -> tuple[jax.Array, jax.Array]:
        """Mean and variance of each weight, in float32, the scales integrated out."""
        scale, spread = core.dense(self.group_mean), jnp.exp(core.dense(self.group_log_variance))
        inner, noise = core.dense(self.mean).astype(jnp.float32), jnp.exp(core.dense(self.log_variance))
        return scale * inner, spread * (noise + jnp.square(inner)) + noise * jnp.square(scale)

    def penalty(self) -> jax.Array:
        """The divergence of the posterior from the prior, up to its constant; that of the scales is approximated."""
        mean, log_variance = core.dense(self.mean).astype(jnp.float32), core.dense(self.log_variance)
        weights = 0.5 * (jnp.exp(log_variance) + jnp.square(mean) - 1 - log_variance).sum()
        return weights + log_uniform_divergence(self.log_alpha()).sum()

    def materialize(self, *, key: jax.Array | None = None) -> jax.Array:
        like = core.dense(self.mean)
        if key is None:
            return gating.kept_or_zero(self.log_alpha() < self.threshold, self.moments()[0], like)
        scale, ours, theirs = core.dense(self.group_mean), *jax.random.split(key)
        scale += jnp.exp(0.5 * core.dense(self.group_log_variance)) * jax.random.normal(ours, scale.shape, jnp.float32)
        deviation = jnp.exp(0.5 * core.dense(self.log_variance))
        return (scale * (like + deviation * jax.random.normal(theirs, like.shape, jnp.float32))).astype(like.dtype)

    def project(self, w: jax.Array, where: jax.Array | None = None) -> Jeffreys:
        """The means become ``w``; scales and variances what they were at the start."""
        ones = jnp.ones(gating.shared_shape(w.shape, self.axes), jnp.float32)
        fields = {
            "mean": w,
            "log_variance": jnp.full(w.shape, self.start, jnp.float32),
            "group_mean": ones,
            "group_log_variance": self.start * ones,
        }
        return dataclasses.replace(self, **{n: core.refitted(getattr(self, n), x) for n, x in fields.items()})

    def finalize(self) -> Masked:
        return Masked(self.materialize(), self.log_alpha() < self.threshold)
