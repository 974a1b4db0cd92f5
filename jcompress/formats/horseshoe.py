"""Weights under a group horseshoe prior."""

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
class Horseshoe(Compressed):
    """``w = z * v`` with ``v ~ N(mean, variance)`` a weight and ``z`` log-normal, one scale a group.

    The prior of a scale is a product of two half-Cauchy variables, one for the group and one, of scale ``tau``, for the
    whole array. Each is the root of a gamma times an inverse gamma variable, and those four have log-normal posteriors
    (Louizos et al. 2017, arXiv:1705.08665, section 4.2). With a key a sample; without one the mean ``E[z] mean``, and
    0 for groups whose scale has its mode near zero, ``-log mode(z) >= threshold``.

    Attributes:
      mean: float array, or a node that stands for one.
      log_variance: float32 array of the same shape.
      group_mean: float32, of length 1 along ``axes``, else of the shape of ``mean``, and a last axis of length 2: the
        means of the logs of the gamma and of the inverse gamma variable.
      group_log_variance: the logs of their variances.
      array_mean: float32, one such pair for the whole array.
      array_log_variance: the logs of their variances.
      axes: negative axes along which a scale is shared.
      ndim: axes of the dense array of one layer; arrays have more where layers are stacked.
      tau: the scale of the prior of the whole array.
      start: the log of all variances at the start of training.
      threshold: of ``-log mode(z)``, from which on a group is pruned.

    Example:
      >>> import dataclasses, jax.numpy as jnp, jcompress as jc
      >>> node = jc.prune.BayesianCompression(threshold=1.0)(jnp.ones((2, 3)))
      >>> lower = jnp.array([[[0.0]], [[-2.0]]])  # of the logs of both variables of the second group
      >>> dataclasses.replace(node, group_mean=node.group_mean + lower).materialize().tolist()
      [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]
    """

    mean: Any
    log_variance: Any
    group_mean: Any
    group_log_variance: Any
    array_mean: Any
    array_log_variance: Any
    axes: tuple[int, ...] = dataclasses.field(default=(-1,), metadata={"static": True})
    ndim: int = dataclasses.field(default=2, metadata={"static": True})
    tau: float = dataclasses.field(default=1e-5, metadata={"static": True})
    start: float = dataclasses.field(default=-9.0, metadata={"static": True})
    threshold: float = dataclasses.field(default=3.0, metadata={"static": True})
    elementwise: ClassVar[tuple[str, ...]] = ("mean", "log_variance")

    def scale(self) -> tuple[jax.Array, jax.Array]:
        """Mean and variance of ``log z``: half the sum, and a quarter of it, of those of its four variables."""
        centre = core.dense(self.group_mean).sum(-1) + core.dense(self.array_mean).sum(-1)
        spread = jnp.exp(core.dense(self.group_log_variance)).sum(-1)
        return 0.5 * centre, 0.25 * (spread + jnp.exp(core.dense(self.array_log_variance)).sum(-1))

    def log_mode(self) -> jax.Array:
        """The log of the mode of each scale."""
        centre, variance = self.scale()
        return centre - variance

    def moments(self) -> tuple[jax.Array, jax.Array]:
        """Mean and variance of each weight, in float32, the scales integrated out."""
        centre, variance = self.scale()
        mean, square = jnp.exp(centre + 0.5 * variance), jnp.exp(2 * centre + variance)
        inner, noise = core.dense(self.mean).astype(jnp.float32), jnp.exp(core.dense(self.log_variance))
        return mean * inner, square * (jnp.expm1(variance) * (noise + jnp.square(inner)) + noise)

    def penalty(self) -> jax.Array:
        """The divergence of the posterior from the prior, exact."""
        mean, log_variance = core.dense(self.mean).astype(jnp.float32), core.dense(self.log_variance)
        weights = 0.5 * (jnp.exp(log_variance) + jnp.square(mean) - 1 - log_variance).sum()
        groups = gamma_divergence(core.dense(self.group_mean), core.dense(self.group_log_variance), 1.0)
        whole = gamma_divergence(core.dense(self.array_mean), core.dense(self.array_log_variance), self.tau)
        return weights + groups.sum() + whole.sum()

    def materialize(self, *, key: jax.Array | None = None) -> jax.Array:
        like = core.dense(self.mean)
        if key is None:
            return gating.kept_or_zero(-self.log_mode() < self.threshold, self.moments()[0], like)
        ours, theirs = jax.random.split(key)
        deviation = jnp.exp(0.5 * core.dense(self.log_variance))
        noise = jax.random.normal(theirs, like.shape, jnp.float32)
        return (self._scales(ours) * (like + deviation * noise)).astype(like.dtype)

    def _scales(self, key: jax.Array) -> jax.Array:
        """Samples of the scales; the variable of the whole array is one for all groups."""
        keys = jax.random.split(key)
        pairs = [
            (core.dense(self.group_mean), core.dense(self.group_log_variance)),
            (core.dense(self.array_mean), core.dense(self.array_log_variance)),
        ]
        logs = [
            m + jnp.exp(0.5 * v) * jax.random.normal(k, m.shape, jnp.float32)
            for k, (m, v) in zip(keys, pairs, strict=True)
        ]
        return jnp.exp(0.5 * (logs[0].sum(-1) + logs[1].sum(-1)))

    def project(self, w: jax.Array, where: jax.Array | None = None) -> Horseshoe:
        """Scales and variances as at the start, and the means that give ``w`` under them.

        Every scale is 1. The variables of the array, and the gamma variables of the groups, lie where their divergence
        is least; the inverse gamma variables of the groups, whose prior has the heavy tail, make up for that.
        """
        every = tuple(range(-self.ndim, 0))
        mean = w.astype(jnp.float32) * math.exp(-0.5 * math.exp(self.start))
        group, array = nearest_means(1.0, self.start), nearest_means(self.tau, self.start)
        pairs = {"group_mean": (self.axes, (group[0], -(group[0] + sum(array)))), "array_mean": (every, array)}
        fields = {"mean": mean.astype(w.dtype), "log_variance": jnp.full(w.shape, self.start, jnp.float32)}
        for name, (axes, pair) in pairs.items():
            shape = (*gating.shared_shape(w.shape, axes), 2)
            fields[name] = jnp.broadcast_to(jnp.asarray(pair, jnp.float32), shape)
        for name in ("group", "array"):
            fields[f"{name}_log_variance"] = jnp.full_like(fields[f"{name}_mean"], self.start)
        return dataclasses.replace(self, **{n: core.refitted(getattr(self, n), x) for n, x in fields.items()})

    def finalize(self) -> Masked:
        return Masked(self.materialize(), -self.log_mode() < self.threshold)


def nearest_means(scale: float, log_variance: float) -> tuple[float, float]:
    """Where :func:`gamma_divergence` is least, rounded to 1024ths, which float32 adds up exactly."""
    down = math.log(2) + 0.5 * math.exp(log_variance)
    return round(1024 * (2 * math.log(scale) - down)) / 1024, round(1024 * down) / 1024


def gamma_divergence(mean: jax.Array, log_variance: jax.Array, scale: float) -> jax.Array:
    """KL of log-normal variables from the gamma and the inverse gamma variable that make a half-Cauchy one.

    Args:
      mean: (..., 2): the means of the logs of the two.
      log_variance: (..., 2): the logs of the variances of their logs.
      scale: of the half-Cauchy variable: the priors are ``Gamma(1/2, scale**2)`` and ``InverseGamma(1/2, 1)``.
    """
    sign, logs = jnp.array([1.0, -1.0]), jnp.array([math.log(scale), 0.0])
    centre = sign * mean - 2 * logs
    return jnp.exp(centre + 0.5 * jnp.exp(log_variance)) - 0.5 * (centre + log_variance + 1 + math.log(2))
