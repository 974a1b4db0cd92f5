"""Weights of three values, two of them learned."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jcompress.core import Context, Method
from jcompress.formats import Ternarized
from jcompress.numeric import scaling
from jcompress.numeric.surrogates import straight_through


@dataclasses.dataclass(frozen=True)
class TTQ(Method):
    """Trained ternary quantization: ``-b``, 0 or ``a``, both levels learned (Zhu et al. 2017, arXiv:1612.01064).

    Weights above ``t * max |w|`` are a, those below minus that are ``-b``. The levels start as the mean magnitudes of
    their weights. For the gradients see :class:`jcompress.formats.Ternarized`.

    Attributes:
      threshold: t above; the paper has 0.05.

    Raises:
      ValueError: for a threshold outside [0, 1).

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.quantize.training.TTQ()(jnp.array([1.0, 3.0, -4.0, 0.1])).materialize().tolist()
      [2.0, 2.0, -4.0, 0.0]
    """

    threshold: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise ValueError(f"TTQ: threshold={self.threshold} is outside [0, 1), fractions of the largest magnitude")

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Ternarized:
        """The node for one array."""
        empty = Ternarized(None, None, None, threshold=float(self.threshold), ndim=w.ndim)
        return empty.project(jnp.copy(w), context.where)


def pruned_ternary(w: jax.Array, sparsity: Any, axes: tuple[int, ...] | None = None) -> jax.Array:
    """Ternary weights by pruning and projection: ``a t``, ``t`` the signs of the largest weights, 0 for the others.

    ``a = <w, t> / <t, t>``, the projection of least squared error. Backward, for a gradient g of the dense array and
    the direction ``u = w / |w|``, ``(g - <g, u> u) |a t| / |w|``: normalization is differentiated, pruning and signs
    are passed straight through, so that weights do not grow along themselves, which would change no sign. Values are
    those of pruning ternary quantization (Liu et al. 2021, arXiv:2107.10998). The estimator is ours, made of what its
    abstract names, normalization, pruning and weight decay, of which the last is left to the optimizer; the paper's own
    may differ. Stored, these weights are
    ``jc.chain(jc.prune.Magnitude(sparsity), jc.quantize.Int(bits=1))``.

    Args:
      w: float array.
      sparsity: the fraction of zeros among the weights of each scale, a number or a traced scalar.
      axes: the axes that share a scale; by default all but the last, so that each output has one.

    Returns:
      An array like ``w``.

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress.quantize.training import pruned_ternary
      >>> pruned_ternary(jnp.array([[3.0], [-5.0], [0.1], [0.2]]), sparsity=0.5)[:, 0].tolist()
      [4.0, -4.0, 0.0, 0.0]
    """
    axes = tuple(range(-w.ndim, -1)) or (-1,) if axes is None else axes
    unit = scaling.of(jnp.max(jnp.abs(w), axes, keepdims=True, initial=0))
    wide = unit.divide(w.astype(jnp.float32))

    def total(x: jax.Array) -> jax.Array:
        return jnp.sum(x, axes, keepdims=True)

    number = total(jnp.ones(w.shape, jnp.float32)) - jnp.round(sparsity * total(jnp.ones(w.shape, jnp.float32)))
    signs = jnp.sign(wide) * (_order(jnp.abs(wide), axes) < number)
    level = total(wide * signs) / jnp.maximum(total(jnp.abs(signs)), 1)
    size, norm = jnp.sqrt(total(jnp.square(level * signs))), jnp.sqrt(total(jnp.square(wide)))
    held = jax.lax.stop_gradient
    direction = wide / jnp.where(norm > 0, held(norm), 1)
    along = total(direction * held(direction)) * held(direction)
    moved = (direction - along) * held(size)
    return straight_through(unit.multiply(moved).astype(w.dtype), unit.multiply(level * signs).astype(w.dtype))


def _order(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The rank of each entry among those along some axes, the largest 0, ties to the lower index."""
    rest = [i for i in range(-x.ndim, 0) if i not in axes]
    flat = jnp.transpose(x, [i % x.ndim for i in (*rest, *axes)])
    ranks = jnp.argsort(jnp.argsort(-flat.reshape(*flat.shape[: len(rest)], -1), -1, stable=True), -1)
    back = sorted(range(x.ndim), key=lambda i: [a % x.ndim for a in (*rest, *axes)][i])
    return ranks.reshape(flat.shape).transpose(back)
