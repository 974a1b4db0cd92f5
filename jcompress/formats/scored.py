"""Arrays whose mask is learned through scores."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core
from jcompress.core import Compressed
from jcompress.formats.frozen import Frozen
from jcompress.formats.masked import Masked
from jcompress.formats.quantized import Quantized
from jcompress.numeric import scaling


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Scored(Compressed):
    """Weights under a mask, with scores that learn which of them to keep.

    Forward this is ``mask * weights``, or ``scale * mask * sign(weights)`` where a scale is given. Backward the mask
    counts as the identity of the scores: for a gradient ``g`` of the dense array, weights get ``mask * g`` and scores
    get ``g * weights``, also where the mask is False, so that a weight can come back. The mask is held; what chose it
    chooses it again from the scores (:func:`jcompress.prune.dynamic.select`).

    Attributes:
      weights: float array, or a node: :class:`Frozen` if only the scores are to learn.
      scores: float array in the shape of the weights; trainable.
      mask: boolean array in the shape of the weights; True keeps.
      scale: a node that stands for the mean magnitude of the kept weights, held, with axes of length 1 over which it is
        one number; or None for the weights themselves. With a scale the weights get no gradient.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> w, mask = jnp.array([3.0, -1.0]), jnp.array([True, False])
      >>> def value(scores):
      ...     return jc.formats.Scored(w, scores, mask).materialize().sum()
      >>> float(value(jnp.zeros(2))), jax.grad(value)(jnp.zeros(2)).tolist()
      (3.0, [3.0, -1.0])
    """

    weights: Any
    scores: Any
    mask: Any
    scale: Any = None
    elementwise: ClassVar[tuple[str, ...]] = ("weights", "scores", "mask")

    def materialize(self, *, key: jax.Array | None = None) -> jax.Array:
        weights, scores = core.dense(self.weights, key=key), core.dense(self.scores, key=key)
        if self.scale is None:
            return _gate(weights, weights, scores, self.mask)
        still = jax.lax.stop_gradient(weights)
        signs = jnp.where(still < 0, -1.0, 1.0)
        return _gate((core.dense(self.scale) * signs).astype(weights.dtype), still, scores, self.mask)

    def choose(self, mask: jax.Array) -> Scored:
        """The same weights and scores under another mask, its scale with it."""
        if self.scale is None:
            return dataclasses.replace(self, mask=mask)
        scale = mean_magnitude(core.dense(self.weights), mask, self._axes())
        return dataclasses.replace(self, mask=mask, scale=Frozen.of(scale))

    def _axes(self) -> tuple[int, ...]:
        """The axes that share a scale; where layers are stacked, not theirs."""
        pairs = zip(core.dense(self.scale).shape, self.mask.shape, strict=True)
        return tuple(i - self.mask.ndim for i, (a, b) in enumerate(pairs) if a != b)

    def project(self, w: jax.Array, where: jax.Array | None = None) -> Scored:
        weights = core.refitted(self.weights, w, where)
        wide, kept = w.astype(jnp.float32), core.dense(weights).astype(jnp.float32)
        # What keeping a weight takes off the squared error: with these scores the best mask would be chosen.
        scores = core.refitted(self.scores, 2 * wide * kept - kept**2)
        return dataclasses.replace(self, weights=weights, scores=scores)

    def finalize(self) -> Compressed:
        if self.scale is None and core.is_node(self.weights) and not isinstance(self.weights, Frozen):
            return Masked(self.weights, self.mask)
        weights = core.dense(self.weights)
        if self.scale is None:
            return Masked(jnp.where(self.mask, weights, jnp.zeros_like(weights)), self.mask)
        codes = jnp.where(weights < 0, -1, 0).astype(jnp.int8)
        signs = Quantized(codes, core.dense(self.scale), bits=1, axes=self._axes(), dtype=np.dtype(weights.dtype))
        return Masked(signs, self.mask)


def mean_magnitude(weights: jax.Array, mask: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """``||mask * weights||_1 / ||mask||_0`` over some axes, kept with length 1; 0 where nothing is kept."""
    kept = jnp.where(mask, jnp.abs(weights), 0)
    unit = scaling.of(jnp.max(kept, axes, keepdims=True, initial=0))
    total = jnp.sum(unit.divide(kept), axes, keepdims=True)
    return unit.multiply(total / jnp.maximum(jnp.sum(mask, axes, jnp.float32, keepdims=True), 1))


@jax.custom_jvp
def _gate(values: jax.Array, weights: jax.Array, scores: jax.Array, mask: jax.Array) -> jax.Array:
    """``mask * values``; its derivative in the scores is ``weights``."""
    return jnp.where(mask, values, jnp.zeros_like(values))


@_gate.defjvp
def _gate_jvp(primals: tuple, tangents: tuple) -> tuple:
    values, weights, _, mask = primals
    moved = jnp.where(mask, tangents[0], jnp.zeros_like(values))
    return _gate(*primals), moved + weights * tangents[2].astype(values.dtype)
