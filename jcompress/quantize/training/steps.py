"""Learned step sizes, for weights and for activations."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jcompress.core import Context, Method
from jcompress.formats import FakeQuantized
from jcompress.formats.fake_quantized import Surrogate, ends
from jcompress.numeric.surrogates import clip_outside, round_through, scaled_gradient
from jcompress.quantize import grids


@dataclasses.dataclass(frozen=True)
class LSQ(Method):
    """Weights on a uniform grid whose step is learned by gradient (Esser et al. 2020, arXiv:1902.08153).

    ``v = s * round(clip(w / s, -2**(bits - 1), 2**(bits - 1) - 1))``; weights and steps both train, see
    :class:`jcompress.formats.FakeQuantized` for their gradients. ``compress`` gives the node to train, ``finalize``
    its integers. Weight decay should not reach the steps.

    Attributes:
      bits: bits a code, 2 to 16.
      group_size: rows of the contraction axis (-2) that share a step; None for no groups.
      axis: without groups, the axis that has a step for each index; None for one step for the whole array, as in the
        paper.
      start: the first step: ``"magnitude"``, ``2 * mean |w| / sqrt(2**(bits - 1) - 1)``; ``"deviation"``,
        ``max(|m - 3 d|, |m + 3 d|) / 2**(bits - 1)`` for the mean m and the standard deviation d of the weights, as in
        LSQ+ (Bhalgat et al. 2020, arXiv:2004.09576); or ``"range"``, which clips nothing.
      pad: whether a last group may be smaller than the others.

    Raises:
      ValueError: for bits outside 2 to 16, or a group size that does not divide.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> w = {"w": jnp.array([[0.5, -1.0], [1.5, 0.2]])}
      >>> tree = jc.compress(w, jc.plan(w, [("w", jc.quantize.training.LSQ(bits=3, axis=None))]))
      >>> jc.finalize(tree)["w"].codes.tolist()
      [[1, -1], [2, 0]]
    """

    bits: int = 4
    group_size: int | None = None
    axis: int | None = -1
    start: Literal["magnitude", "deviation", "range"] = "magnitude"
    pad: bool = False

    def __post_init__(self) -> None:
        if self.start not in ("magnitude", "deviation", "range"):
            raise ValueError(f"LSQ: start={self.start!r} is unknown; use 'magnitude', 'deviation' or 'range'")
        grids.validate_bits(self, least=2, most=16)
        grids.validate_group(self)

    def check(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise if groups or the channel axis do not fit the shape."""
        grids.check(self, path, shape)

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> FakeQuantized:
        """The node for one array."""
        node = spanning(self, w, context)
        return node if self.start == "range" else dataclasses.replace(node, scale=self._start(w, context))

    def _start(self, w: jax.Array, context: Context) -> jax.Array:
        levels = 2 ** (self.bits - 1)
        problem, unit = grids.pose(self, w, context, grids.Grid(self.bits, jnp.int8, levels - 1.0)).normal()
        x, count = problem.x, problem.count()
        if self.start == "magnitude":
            return grids.positive(unit.multiply(problem.pool(jnp.abs(x)) / count * (2 / (levels - 1) ** 0.5)))
        mean = problem.pool(x) / count
        deviation = jnp.sqrt(jnp.maximum(problem.pool(x * x) / count - mean**2, 0.0))
        return grids.positive(unit.multiply((jnp.abs(mean) + 3 * deviation) * (1 / levels)))


def spanning(method: Any, w: jax.Array, context: Context, surrogate: Surrogate = "identity") -> FakeQuantized:
    """A node whose grid spans the range of ``w``, its scales laid out as the method says."""
    grids.check(method, context.path, w.shape)
    axes = grids.shared_axes(w.ndim, method.group_size, method.axis)
    empty = FakeQuantized(
        None, None, bits=int(method.bits), surrogate=surrogate, axes=axes, group_size=method.group_size
    )
    return empty.project(jnp.copy(w), context.where)


def lsq(x: jax.Array, scale: jax.Array, bits: int, signed: bool = False, *, features: int | None = None) -> jax.Array:
    """Activations on a grid whose step is learned: ``s * round(clip(x / s, -n, p))`` (Esser et al. 2020, 1902.08153).

    Unsigned, ``n = 0`` and ``p = 2**bits - 1``; signed, ``n = 2**(bits - 1)`` and ``p = n - 1``. Within the grid x gets
    its gradient and the step ``g * (round(x / s) - x / s)``, beyond it x gets none and the step ``p * g`` or
    ``-n * g``, summed over x and divided by ``sqrt(N * p)`` for the N features of one example that share the step: a
    larger batch is no reason for a smaller gradient. A good first step is ``2 * mean |x| / sqrt(p)``.

    Args:
      x: float array.
      scale: the step, a positive scalar or an array that broadcasts against x.
      bits: 2 to 8.
      signed: whether x has both signs.
      features: N; by default all entries of one example, the first axis counting examples where there are two axes or
        more, shared out among the steps.

    Returns:
      The activations on the grid, of the shape and dtype of ``x``.

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress.quantize.training import lsq
      >>> lsq(jnp.array([-1.0, 0.3, 9.0]), jnp.array(0.25), bits=2).tolist()
      [0.0, 0.25, 0.75]
    """
    n, p = ends(bits, signed)
    scale = scaled_gradient(scale, (_features(x, scale, features) * p) ** -0.5)
    return (round_through(clip_outside(x / scale, -n, p)) * scale).astype(x.dtype)


def _features(x: jax.Array, scale: jax.Array, given: int | None) -> float:
    """How many features of one example share a step."""
    if given is not None:
        return given
    examples = x.shape[0] if x.ndim > 1 else 1
    return max(x.size / max(examples, 1) / max(jnp.size(scale), 1), 1.0)


def lsq_plus(x: jax.Array, scale: jax.Array, offset: jax.Array, bits: int, *, features: int | None = None) -> jax.Array:
    """Activations on an asymmetric grid, ``s * round(clip((x - b) / s, 0, 2**bits - 1)) + b``.

    The offset b is learned too: it gets the gradient of what is clipped, and none of what is not (LSQ+; Bhalgat et al.
    2020, arXiv:2004.09576). It suits activations whose few negative values matter, such as those of Swish.

    Args:
      x: float array.
      scale: the step, a positive scalar or an array that broadcasts against x.
      offset: the least value of the grid, likewise.
      bits: 2 to 8.
      features: as for :func:`lsq`.

    Returns:
      The activations on the grid, of the shape and dtype of ``x``.

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress.quantize.training import lsq_plus
      >>> lsq_plus(jnp.array([-1.0, 0.3, 9.0]), jnp.array(0.5), jnp.array(-0.25), bits=2).tolist()
      [-0.25, 0.25, 1.25]
    """
    factor = (_features(x, scale, features) * (2**bits - 1)) ** -0.5
    scale, offset = scaled_gradient(scale, factor), scaled_gradient(offset, factor)
    return (round_through(clip_outside((x - offset) / scale, 0, 2**bits - 1)) * scale + offset).astype(x.dtype)
