"""Losses that compare how features are distributed: variational information, neuron selectivity."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jcompress.core import PyTree
from jcompress.distill.arrays import applied, pairs, rows, summed, unit, wide
from jcompress.distill.hidden import Maps


def variational_information(
    student: PyTree, teacher: PyTree, scale: PyTree, regressor: Maps | None = None, floor: float = 1e-5
) -> jax.Array:
    """A bound of the mutual information of both networks' features (VID; Ahn et al. 2019, arXiv:1904.05835).

    The negative log likelihood of the teacher's features under a normal distribution around a map of the student's:
    ``mean sum_c log sigma_c + (t_c - r(s)_c)**2 / (2 sigma_c**2)``, ``sigma_c**2 = floor + softplus(scale_c)``, the sum
    over positions and channels and over layers. Maps and scales are trained with the student; the best ``sigma_c**2``
    is the variance of what the map leaves.

    Args:
      student: features (batch, positions..., channels), or a pytree of them.
      teacher: the same of the teacher.
      scale: (channels,) for each array of features, before the softplus; zeros are a start.
      regressor: a function of the student's features, or a tree of functions; the identity by default.
      floor: of the variance.

    Returns:
      A float32 scalar; its least value in the student is where the map gives the teacher's features.

    Raises:
      ValueError: for trees or shapes that differ.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> x, scale = jnp.ones((2, 3)), jnp.full(3, 0.5413249)
      >>> abs(round(float(jc.distill.variational_information(x, x, scale)), 3))
      0.0
    """
    found = pairs("variational_information", applied("variational_information", regressor, student), teacher)
    scales = jax.tree.leaves(scale)
    if [s.shape for s in map(jnp.asarray, scales)] != [t.shape[-1:] for _, t in found]:
        raise ValueError(
            f"variational_information: found scales {[jnp.shape(s) for s in scales]}, expected one of shape "
            f"(channels,) for each of {[t.shape for _, t in found]}"
        )

    def once(s: jax.Array, t: jax.Array, scale: jax.Array) -> jax.Array:
        variance = floor + jax.nn.softplus(wide(scale))
        each = jnp.log(variance) / 2 + jnp.square(t - s) / (2 * variance)
        return jnp.mean(jnp.sum(rows(each), -1))

    return summed(once(s, t, scale) for (s, t), scale in zip(found, scales, strict=True))


def neuron_selectivity(
    student: PyTree, teacher: PyTree, kernel: Callable[[jax.Array], jax.Array] = jnp.square
) -> jax.Array:
    """Discrepancy of the patterns in which neurons fire over positions (NST; Huang & Wang 2017, arXiv:1707.01219).

    The squared maximum mean discrepancy of the channels' maps, each of unit length, mean over the batch, sum over
    layers: ``mean_ij k(t_i, t_j) + mean_ij k(s_i, s_j) - 2 mean_ij k(t_i, s_j)``. Channels may be of any number and in
      any
    order.

    Args:
      student: features (batch, positions..., channels), or a pytree of them.
      teacher: the same of the teacher, with as many positions.
      kernel: of the cosine of two maps. The square is the paper's polynomial kernel; ``lambda c: c`` the linear one,
        ``lambda c: jnp.exp((c - 1) / variance)`` the Gaussian.

    Returns:
      A float32 scalar, at least 0, and 0 where the two agree.

    Raises:
      ValueError: for trees or positions that differ, or features without positions.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> x = jnp.arange(12.0).reshape(1, 4, 3)
      >>> round(float(jc.distill.neuron_selectivity(x[..., ::-1], x)), 5)
      0.0
    """

    def once(s: jax.Array, t: jax.Array) -> jax.Array:
        if s.ndim < 3:
            raise ValueError(f"neuron_selectivity: found {s.shape}, expected (batch, positions..., channels)")
        s, t = (unit(x.reshape(x.shape[0], -1, x.shape[-1]), axis=1) for x in (s, t))

        def alike(a: jax.Array, b: jax.Array) -> jax.Array:
            return jnp.mean(kernel(jnp.einsum("bpi,bpj->bij", a, b, precision="highest")))

        return alike(t, t) + alike(s, s) - 2 * alike(s, t)

    return summed(once(s, t) for s, t in pairs("neuron_selectivity", student, teacher, "positions"))
