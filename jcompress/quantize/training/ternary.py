"""Weights of three values, two of them learned."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jcompress.core import Context, Method
from jcompress.formats import Ternarized


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
