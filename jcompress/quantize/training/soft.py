"""Quantizers with soft gradients, soft assignments, and noise in proportion to the error."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jcompress.core import Context, Method, PyTree
from jcompress.formats import FakeQuantized
from jcompress.numeric.surrogates import straight_through
from jcompress.quantize import grids
from jcompress.quantize.training.steps import spanning


@dataclasses.dataclass(frozen=True)
class DSQ(Method):
    """Differentiable soft quantization: rounds hard, with the gradient of tanh in each step (Gong et al. 2019).

    With ``s = 1 / (1 - a) = 1 / tanh(k / 2)`` for the softness a, ``k = log(2 / a - 1)`` and t within (-1/2, 1/2) the
    place of ``w / step`` in its interval, the derivative is that of ``(s * tanh(k * t) + 1) / 2``: large near the
    middle of two levels, small at a level. As a falls to 0 this is hard rounding, at 1 the identity. Softness, starting
    at 0.2, and steps are learned (arXiv:1908.05033).

    Attributes:
      bits: bits a code, 2 to 16.
      group_size: rows of the contraction axis (-2) that share a step; None for no groups.
      axis: without groups, the axis that has a step for each index; None for one step for the whole array.
      pad: whether a last group may be smaller than the others.

    Raises:
      ValueError: for bits outside 2 to 16, or a group size that does not divide.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.quantize.training.DSQ(bits=2)(jnp.array([[2.0], [-3.0]])).materialize().tolist()
      [[2.0], [-4.0]]
    """

    bits: int = 4
    group_size: int | None = None
    axis: int | None = -1
    pad: bool = False

    check = grids.check

    def __post_init__(self) -> None:
        grids.validate_bits(self, least=2, most=16)
        grids.validate_group(self)

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> FakeQuantized:
        """The node for one array."""
        return spanning(self, w, context, "soft")


def soft_assign(z: jax.Array, centers: jax.Array, hardness: Any) -> tuple[jax.Array, jax.Array]:
    """Soft-to-hard vector quantization (Agustsson et al. 2017, arXiv:1704.00648).

    ``p = softmax_j(-hardness * ||z - c_j||**2)`` and ``sum_j p_j * c_j``, which tends to the nearest center as the
    hardness grows. Differentiable in z and the centers.

    Args:
      z: float array (..., dim).
      centers: float array (clusters, dim).
      hardness: a positive number, annealed upwards in training.

    Returns:
      The soft values (..., dim) and the assignments p (..., clusters).

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress.quantize.training import soft_assign
      >>> soft_assign(jnp.array([[0.2]]), jnp.array([[0.0], [1.0]]), 1e3)[0].tolist()
      [[0.0]]
    """
    distance = jnp.square(z[..., None, :] - centers).sum(-1)
    p = jax.nn.softmax(-hardness * distance)
    return jnp.einsum("...j,jd->...d", p, centers, precision=jax.lax.Precision.HIGHEST), p


def assignment_entropy(p: jax.Array) -> jax.Array:
    """The entropy, in bits, of the mean assignment: what a code for each vector takes on average, times a strength.

    As a term of the loss it makes soft assignments cheaper to store.

    Args:
      p: assignments (..., clusters) of :func:`soft_assign`.

    Returns:
      A scalar, in bits.

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress.quantize.training import assignment_entropy
      >>> float(assignment_entropy(jnp.eye(4)))
      2.0
    """
    mean = p.reshape(-1, p.shape[-1]).mean(0)
    return -jnp.sum(jnp.where(mean > 0, mean * jnp.log2(jnp.where(mean > 0, mean, 1.0)), 0.0))


def temper(params: PyTree, simulated: PyTree, temperature: Any, key: jax.Array) -> PyTree:
    """Quantized weights with noise in proportion to their error, ``q + temperature * |w - q| * n``, n normal.

    The gradient is the identity in the weights. A temperature ``exp(-rate * step)`` makes the noise fade, which leaves
    straight-through training (after Wang et al. 2022, arXiv:2212.05603, of which the noise is taken, not the learned
    scale of the gradient).

    Args:
      params: dense parameters.
      simulated: what ``jc.simulate`` made of them.
      temperature: a number, not negative.
      key: for the noise.

    Returns:
      A tree like ``params``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jcompress.quantize.training import temper
      >>> temper({"w": jnp.array([0.6])}, {"w": jnp.array([1.0])}, 0.0, jax.random.key(0))["w"].tolist()
      [1.0]
    """
    leaves, others = jax.tree.leaves(params), jax.tree.leaves(simulated)

    def one(i: int, w: jax.Array, q: Any) -> jax.Array:
        noise = jax.random.normal(jax.random.fold_in(key, i), w.shape, w.dtype)
        return straight_through(w, q + temperature * jnp.abs(w - q) * noise)

    noisy = [one(i, w, q) for i, (w, q) in enumerate(zip(leaves, others, strict=True))]
    return jax.tree.unflatten(jax.tree.structure(params), noisy)
