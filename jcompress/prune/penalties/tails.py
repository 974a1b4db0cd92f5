"""Heavy-tailed noise, under which trained weights become compressible."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jcompress import core, transforms
from jcompress.core import PyTree


def stable(key: jax.Array, alpha: Any, shape: tuple[int, ...] = (), dtype: Any = jnp.float32) -> jax.Array:
    """Samples of the symmetric alpha-stable distribution, ``E exp(i t x) = exp(-|t|**alpha)``.

    ``x = sin(alpha v) / cos(v)**(1 / alpha) * (cos((1 - alpha) v) / e)**((1 - alpha) / alpha)`` for v uniform in
    ``(-pi/2, pi/2)`` and e exponential (Chambers, Mallows & Stuck 1976). ``alpha = 2`` is the normal distribution of
    variance 2, ``alpha = 1`` the Cauchy distribution; below 2 the variance is infinite.

    Args:
      key: a PRNG key.
      alpha: the tail index, in (0, 2]; may be traced.
      shape: of the samples.
      dtype: of the samples, a float.

    Returns:
      An array of this shape and dtype.

    Raises:
      ValueError: for an alpha outside (0, 2] that is known now.

    Example:
      >>> import jax
      >>> from jcompress.prune import penalties
      >>> penalties.stable(jax.random.key(0), 1.5, (3,)).shape
      (3,)
    """
    _check(alpha)
    angle, wait = jax.random.split(key)
    # The ends of the interval, where the cosine is zero, are left out.
    v = jnp.pi * (jax.random.uniform(angle, shape, jnp.float32, 1e-6, 1 - 1e-6) - 0.5)
    e = jnp.maximum(jax.random.exponential(wait, shape, jnp.float32), jnp.finfo(jnp.float32).tiny)
    tail = (jnp.cos((1 - alpha) * v) / e) ** ((1 - alpha) / alpha)
    return (jnp.sin(alpha * v) / jnp.cos(v) ** (1 / alpha) * tail).astype(dtype)


class NoiseState(NamedTuple):
    """State of :func:`add_stable_noise`.

    Attributes:
      steps: the steps taken.
      key: the PRNG key.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jcompress.prune import penalties
      >>> int(penalties.add_stable_noise(0.01, 0.1, 1.8, jax.random.key(0)).init({"w": jnp.zeros(2)}).steps)
      0
    """

    steps: jax.Array
    key: jax.Array

    def nodes(self, params: Mapping[str, jax.Array], /) -> dict[str, Any]:
        """Nothing: noise makes no zeros; prune afterwards."""
        return {}


def add_stable_noise(
    scale: optax.ScalarOrSchedule, learning_rate: optax.ScalarOrSchedule, alpha: Any, key: jax.Array
) -> optax.GradientTransformationExtraArgs:
    """Add ``scale * learning_rate**(1 / alpha) * x`` to the updates, with alpha-stable x: an optax transform.

    Behind ``optax.sgd(learning_rate)`` this is the discretisation of a gradient flow driven by a stable process. Heavy
    tails, alpha below 2, leave weights of which a few carry nearly all of the norm, so that pruning by magnitude of
    weights, columns or singular values costs little (Barsbey et al. 2021, arXiv:2106.03795; Wan et al. 2023,
    arXiv:2306.08125, who then keep the largest columns).

    Args:
      scale: of the noise, or a schedule.
      learning_rate: that of the optimizer, or the same schedule.
      alpha: the tail index, in (0, 2].
      key: a PRNG key. Every step and every leaf draws from a key of its own.

    Returns:
      A ``GradientTransformationExtraArgs``.

    Raises:
      ValueError: for an alpha outside (0, 2].

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jcompress.prune import penalties
      >>> noise = penalties.add_stable_noise(0.01, 0.1, alpha=1.8, key=jax.random.key(0))
      >>> tx = optax.chain(optax.sgd(0.1), noise)
      >>> params = {"w": jnp.ones((2, 3))}
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> updates["w"].shape
      (2, 3)
    """
    _check(alpha)

    def init(params: PyTree) -> NoiseState:
        return NoiseState(transforms.steps(), transforms.copied(key))

    def update(
        updates: PyTree, state: NoiseState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, NoiseState]:
        rate, size = core.value_at(learning_rate, state.steps), core.value_at(scale, state.steps)
        now = jax.random.fold_in(state.key, state.steps)
        leaves, treedef = jax.tree.flatten(updates)
        noisy = [
            (u + size * rate ** (1 / alpha) * stable(jax.random.fold_in(now, i), alpha, u.shape)).astype(u.dtype)
            for i, u in enumerate(leaves)
        ]
        return jax.tree.unflatten(treedef, noisy), NoiseState(optax.safe_increment(state.steps), state.key)

    return optax.GradientTransformationExtraArgs(init, update)


def _check(alpha: Any) -> None:
    if core.is_concrete(alpha) and not 0 < float(alpha) <= 2:
        raise ValueError(f"alpha={alpha} is outside (0, 2]; 2 is Gaussian noise, and smaller has heavier tails")
